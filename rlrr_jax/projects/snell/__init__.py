"""SNELL, as a method: a sparse change of every kernel, made by distances between inputs and outputs."""

NAMES = {"method": {"snell": "rlrr_jax.projects.snell.method:method"}}
