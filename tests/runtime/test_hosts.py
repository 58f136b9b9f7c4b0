"""Two real processes whose hosts differ: one sentence before any work, that says in what."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from flags import xla_flags
from PIL import Image
from test_distributed import ROOT, free_port


def pair(tmp_path, *, configs=None, workdirs=None, devices=(1, 1), code=(ROOT, ROOT), more=()):
    """Two processes of one command, with what differs between them."""
    configs = configs or ["configs/vtab.py:digits,method=rlrr"] * 2
    workdirs, port, out = workdirs or [tmp_path / "w"] * 2, free_port(), []
    for i in range(2):
        extra = {"XLA_FLAGS": xla_flags(devices[i]), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(code[i])}
        extra |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_ID": str(i)}
        extra |= {"JAX_NUM_PROCESSES": "2", "RLRR_JAX_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "rlrr_jax.main", f"--config={configs[i]}", *more]
        command += [
            f"--workdir={workdirs[i]}",
            "--distributed_timeout=60",
            "--config.model.variant=bundled",
        ]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out.append(subprocess.Popen(command, cwd=code[i], env={**os.environ, **extra}, **pipes))
    return out


def pictures(root, swapped):
    for k, name in enumerate(("lying", "standing")):
        (root / name).mkdir(parents=True)
        for i in range(6):
            image = np.random.default_rng([k, i]).integers(0, 128, (32, 32, 3), np.uint8)
            image = image.swapaxes(0, 1) if k ^ swapped else image
            Image.fromarray(np.ascontiguousarray(image)).save(root / name / f"{i}.png")
    return f"configs/own.py:{root},method=rlrr"


def other_code(tmp_path):
    """A clone whose updates have the other sign."""
    clone = tmp_path / "clone"
    for name in ("rlrr_jax", "configs"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True)
    step = clone / "rlrr_jax" / "step.py"
    step.write_text(step.read_text().replace("lr = hyper.lr[", "lr = -hyper.lr["))
    return clone


CASES = {
    "images": (
        lambda t: dict(configs=[pictures(t / "a" / "x", False), pictures(t / "b" / "x", True)]),
        "the processes found different images: copy the same files to every host",
    ),
    "code": (
        lambda t: dict(code=(ROOT, other_code(t))),
        "the processes run different code: bring rlrr_jax",
    ),
    "workdir": (lambda t: dict(workdirs=[t / "n0", t / "n1"]), "not every process sees the workdir"),
    "devices": (lambda t: dict(devices=(1, 3)), "the processes have 1, 3 devices: give each as many"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
def test_hosts_that_differ(what, tmp_path):
    make, message = CASES[what]
    begun = time.monotonic()
    processes = pair(tmp_path, **make(tmp_path))
    texts = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], texts
    assert all(message in err and "Traceback" not in err for _, err in texts), texts
    assert time.monotonic() - begun < 100
    assert not list(pathlib.Path(tmp_path).rglob("metrics.jsonl"))


@pytest.mark.slow
def test_ctrl_c_in_both_is_an_interruption(tmp_path):
    processes = pair(tmp_path, more=("--config.epochs=400",))
    for _ in range(600):
        if list(tmp_path.rglob("metrics.jsonl")):
            break
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGINT)
    texts = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [130, 130], texts
    assert all("KeyboardInterrupt: " not in err for _, err in texts), texts
    assert any("interrupted: what was saved" in err for _, err in texts)
