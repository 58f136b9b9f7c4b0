"""Configurations; installed as `rlrr_jax.configs`."""
