"""Real JAX processes over loopback: the same numbers as one process, stopped, resumed, failing."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from flags import xla_flags
from float64 import near
from marks import quick

from rlrr_jax import files
from rlrr_jax.main import STOPPED

ROOT = pathlib.Path(__file__).parents[2]
RUN = "digits/rlrr/seed0"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workdir, *args, number=1, devices=1, **environment):
    """So many processes of one run, each with its own devices."""
    port = free_port()
    command = [sys.executable, "-m", "rlrr_jax.main", "--config=configs/vtab.py:digits,method=rlrr"]
    command += ["--config.epochs=3", "--config.protocol=official", "--config.drop_path=0.2"]
    command += ["--config.flip=True", "--config.checkpoint_seconds=0", f"--workdir={workdir}", *args]
    out = []
    for i in range(number):
        extra = {"XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu", **environment}
        if number > 1:
            extra |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_ID": str(i)}
            extra |= {"JAX_NUM_PROCESSES": str(number)}
        out.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **extra},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return out


def end(processes, code=0):
    """Waits for all; their stdout and stderr."""
    texts = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), texts
    return texts


def outcome(workdir):
    """Losses and accuracies by epoch, and the adapter."""
    keys = ("train_loss", "train_acc", "test_acc", "test_loss")
    rows = files.read_rows(workdir / RUN / "metrics.jsonl")
    adapter = safetensors.numpy.load_file(workdir / RUN / "adapter.safetensors")
    return [[row[k] for k in keys if k in row] for row in rows], adapter


def epochs(workdir):
    return len(files.read_rows(workdir / RUN / "metrics.jsonl"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process with two devices."""
    workdir = tmp_path_factory.mktemp("reference")
    end(start(workdir, devices=2))
    return outcome(workdir)


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_by_one_give_the_same_bits(reference, tmp_path):
    """SIGTERM reaches one of two; both save and say so; one process with two devices ends the run."""
    processes = start(tmp_path, number=2)
    for _ in range(3000):
        if epochs(tmp_path):
            break
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    texts = end(processes, STOPPED)
    for i, (out, err) in enumerate(texts):
        assert f"process {i} of 2: 1 of 2 cpu devices" in err
        assert "stopped and saved: the same command goes on" in err and "Traceback" not in err
        assert ("workdir:" in out) == (i == 0)
    assert 1 <= epochs(tmp_path) < 3 and not (tmp_path / RUN / "result.json").exists()
    ((out, _),) = end(start(tmp_path, devices=2))
    assert "goes on at epoch" in out
    losses, adapter = outcome(tmp_path)
    assert losses == reference[0]
    for name, value in reference[1].items():
        np.testing.assert_array_equal(adapter[name], value, err_msg=name)


@pytest.mark.slow
def test_four_processes_begun_by_two(reference, tmp_path):
    """Another order of sums, so equal but for rounding."""
    processes = start(tmp_path, number=2)
    while not epochs(tmp_path):
        time.sleep(0.05)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    end(start(tmp_path, number=4))
    losses, adapter = outcome(tmp_path)
    for ours, theirs in zip(losses, reference[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.01)
    for name, value in reference[1].items():
        if "key/shift" not in name:
            near(adapter[name], value, 0.03, name)


@pytest.mark.slow
def test_sigterm_to_one_of_two_that_still_prepare_ends_both(tmp_path):
    for asked in (0, 1):
        processes = start(tmp_path, number=2)
        while not processes[0].stdout.readline().startswith("workdir:"):
            assert processes[0].poll() is None, processes[0].communicate()
        begun = time.monotonic()
        processes[asked].send_signal(signal.SIGTERM)
        for _, err in end(processes, STOPPED):
            assert err.strip().endswith("stopped and saved: the same command goes on")
        assert time.monotonic() - begun < 20
    assert not list(tmp_path.rglob("result.json"))


def test_a_process_that_fails_ends_all_with_its_message(tmp_path):
    one, _ = start(tmp_path, number=2), None
    one[1].kill()  # replaced by one with another configuration, at the same place
    environment = dict(
        item.split("=", 1)
        for item in pathlib.Path(f"/proc/{one[0].pid}/environ").read_text().split("\0")
        if item.startswith("JAX_")
    )
    command = [sys.executable, "-m", "rlrr_jax.main", "--config=configs/vtab.py:digits,method=rlrr"]
    other = subprocess.Popen(
        [*command, "--config.epochs=9", f"--workdir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, **environment, "XLA_FLAGS": xla_flags(), "JAX_PROCESS_ID": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    one[1].communicate()
    begun = time.monotonic()
    for _, err in end([one[0], other], 1):
        assert "the processes were started with different configurations" in err, err
        assert "Traceback" not in err
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("mine", quick([0, 1], 0))
def test_others_that_do_not_come(tmp_path, mine):
    (process,) = start(
        tmp_path,
        "--distributed_timeout=3",
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}",
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID=str(mine),
    )
    ((_, err),) = end([process], 1)
    assert "gave up after 3 s: not all of the 2 processes came to 127.0.0.1" in err
    assert f"this is process {mine}" in err and "Traceback" not in err


@pytest.mark.slow
def test_on_without_others(tmp_path):
    ((_, err),) = end(start(tmp_path, "--distributed=on"), 1)
    assert err.startswith("error: --distributed=on found no other processes") and "SLURM" in err
    assert len(err.splitlines()) == 1
