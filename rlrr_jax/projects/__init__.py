"""One idea each, in a folder: its code, command and page. The library beside them knows none."""

NAMES: dict[str, dict[str, str]] = {  # see lookup.py
    "loss": {
        "pace": "rlrr_jax.projects.pace.losses:pace",
        "pace_lazy": "rlrr_jax.projects.pace.losses:pace_lazy",
        "pace_fast": "rlrr_jax.projects.pace.losses:pace_fast",
    },
}
