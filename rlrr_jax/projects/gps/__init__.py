"""GPS, as a method: the weights with the largest gradients are trained as they are."""

NAMES = {
    "method": {
        "gps": "rlrr_jax.projects.gps.method:method",
        "gps_layers": "rlrr_jax.projects.gps.layers:method",
    }
}
