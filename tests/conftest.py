"""Four CPU devices for every test, and runs that several files look at."""

import os

from flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(4)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import pytest

hypothesis.settings.register_profile("short", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile("short")


@pytest.fixture(scope="session")
def tuned_runs(tmp_path_factory):
    """A workdir with runs: RLRR, LoRA and SSF on digits, RLRR on hearts, all trained briefly."""
    from configs import vtab
    from rlrr_jax import suite

    workdir = tmp_path_factory.mktemp("tuned")
    for arg in ("digits,method=rlrr+lora+ssf", "hearts,method=rlrr"):
        config = vtab.get_config(arg)
        config.update(num_devices=1, epochs=2)
        suite.run(config, workdir)
    return workdir
