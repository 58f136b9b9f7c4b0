"""Four CPU devices for every test, and runs that several files look at."""

import os
import pathlib
import subprocess
import sys

from flags import quick_xla_flags

os.environ["XLA_FLAGS"] = quick_xla_flags(4)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import pytest

hypothesis.settings.register_profile("short", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile("short")


@pytest.fixture(scope="session")
def tuned_runs(tmp_path_factory):
    """A workdir with runs: RLRR, LoRA and SSF on digits, RLRR on hearts, all trained briefly."""
    workdir = tmp_path_factory.mktemp("tuned")
    for arg in ("digits,method=rlrr+lora+ssf", "hearts,method=rlrr"):  # as a user's process compiles
        command = [sys.executable, "-m", "rlrr_jax.main", f"--config=configs/vtab.py:{arg}"]
        command += ["--config.epochs=2", f"--workdir={workdir}"]
        root = pathlib.Path(__file__).parents[1]
        subprocess.run(command, cwd=root, env={**os.environ, "XLA_FLAGS": ""}, check=True)
    return workdir
