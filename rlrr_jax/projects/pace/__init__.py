"""PACE, as losses: consistency of passes with noise on what was changed."""

_LOSSES = "rlrr_jax.projects.pace.losses"
NAMES = {"loss": {name: f"{_LOSSES}:{name}" for name in ("pace", "pace_lazy", "pace_fast")}}
