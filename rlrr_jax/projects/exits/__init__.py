"""Early exits: the loss `exits`, the method `met`, thresholds, and prediction that skips blocks."""

NAMES = {
    "method": {"met": "rlrr_jax.projects.exits.met:method"},
    "loss": {"exits": "rlrr_jax.projects.exits.losses:LOSS"},
}
