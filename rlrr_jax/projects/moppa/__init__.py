"""MoPPA, as a method: heat, wave and Poisson operators before attention; it folds into no weight."""

NAMES = {
    "method": {"moppa": "rlrr_jax.projects.moppa.method:method"},
    "block": {"moppa": "rlrr_jax.projects.moppa.block:Block"},
    "loss": {"moppa": "rlrr_jax.projects.moppa.losses:moppa"},
}
