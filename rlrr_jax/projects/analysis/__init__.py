"""What tuning changed in every kernel: `python -m rlrr_jax.projects.analysis WORKDIR`."""
