"""What a configuration would cost on devices that are not there: `python -m rlrr_jax.plan --help`."""
