"""What accelerators' compilers say, where their wheels are installed. Slow: minutes each."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

FILE = pathlib.Path(__file__).with_name("matrix.py")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs jax[tpu]")
@pytest.mark.parametrize("only", ["ViT-B/16 ", "Swin-T", "ResNet-50", "MAP", "whole"])
def test_every_program_compiles_for_a_tpu(only):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    command = [sys.executable, FILE, "--only", only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "GiB" in done.stdout, done.stdout + done.stderr
