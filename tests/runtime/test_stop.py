"""Runs that are stopped, killed, or whose loss is not finite."""

import json
import math
import os
import pathlib
import random
import shlex
import signal
import subprocess
import time

import kill_runs
import pytest
from flags import xla_flags
from marks import quick

from rlrr_jax import files, suite
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.main import STOPPED
from rlrr_jax.runtime.stop import Stop, Stopped

ROOT = pathlib.Path(__file__).parents[2]


def config(**changes):
    config = vtab.get_config("digits,method=rlrr")
    config.model.depth = 2
    with config.unlocked():
        config.update({"num_devices": 1, "epochs": 2, **changes})
    return config


def start(workdir, before="true"):
    command = shlex.join([*kill_runs.COMMAND, f"--workdir={workdir}"])
    return subprocess.Popen(
        ["bash", "-c", f"{before}; exec {command}"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla_flags()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_epochs(process, workdir, number):
    rows = workdir / "digits/rlrr/seed0/metrics.jsonl"
    for _ in range(6000):
        if len(files.read_rows(rows)) >= number:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no epoch")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(UserError) as e:
        suite.run(config(lr=1e30), tmp_path)
    text = str(e.value)
    assert "the loss of digits rlrr, or its gradient, is not finite at step " in text
    assert " of epoch 1, learning rate " in text and "lower config.lr" in text
    assert not (tmp_path / "digits/rlrr/seed0/result.json").exists()


@pytest.mark.slow
def test_the_last_good_checkpoint_is_kept(tmp_path, capsys):
    """The official schedule begins with two epochs of 1e-7; then the learning rate is absurd."""
    settings = config(epochs=22, checkpoint_seconds=0.0, schedule="official", lr=1e30)
    for _ in range(2):
        with pytest.raises(UserError, match="not finite at step 2 of epoch 3, learning rate 5e.29"):
            suite.run(settings, tmp_path)
    assert "goes on at epoch 3, step 0" in capsys.readouterr().out


@pytest.mark.slow
def test_one_trial_that_diverges_does_not_stop_the_others(tmp_path):
    rows, problems = suite.run(config(runs=({"lr": (1e30, 0.01)},)), tmp_path)
    assert not problems
    bad, good = rows
    assert bad["train_loss"] is None and good["train_loss"] < 1
    assert good["test_acc_final"] > 0.8 and bad["test_acc_final"] == 0

    def no_constant(name):
        raise AssertionError(name)

    json.loads((tmp_path / "results.json").read_text(), parse_constant=no_constant)
    assert math.isfinite(good["test_acc_final"])


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_its_code_and_the_run_ends_the_same(tmp_path):
    reference = start(tmp_path / "whole")
    process = start(tmp_path / "broken")
    wait_for_epochs(process, tmp_path / "broken", 2)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert process.returncode == STOPPED == 75
    assert err.strip().endswith("stopped and saved: the same command goes on")
    out, err = (last := start(tmp_path / "broken")).communicate(timeout=300)
    assert last.returncode == 0, err
    assert "goes on at epoch" in out
    assert reference.communicate(timeout=300) and reference.returncode == 0
    assert kill_runs.contents(tmp_path / "broken") == kill_runs.contents(tmp_path / "whole")


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.5])
def test_a_signal_while_python_imports_ends_with_the_code_of_a_stop(seconds, tmp_path):
    process = start(tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == STOPPED


@pytest.mark.parametrize("kind", quick([signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], signal.SIGTERM))
def test_a_signal_before_there_is_anything_to_save_ends_at_once(kind, tmp_path):
    process = start(tmp_path)
    assert process.stdout.readline() == f"workdir: {tmp_path}\n"  # then it compiles
    begun = time.monotonic()
    process.send_signal(kind)
    _, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED and time.monotonic() - begun < 20
    assert err.strip().endswith("stopped and saved: the same command goes on")
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 1, 3])
def test_sigterm_while_a_later_method_compiles(seconds, tmp_path):
    command = [*kill_runs.COMMAND, f"--workdir={tmp_path}/w"]
    command = [text.replace("method=rlrr", "method=lora+glora") for text in command]
    environment = {**os.environ, "XLA_FLAGS": xla_flags(), "RLRR_JAX_CACHE": str(tmp_path / "cache")}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    while not (tmp_path / "w/digits/glora/seed0/config.json").exists():  # then it compiles
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == STOPPED, err
    assert err.strip().endswith("stopped and saved: the same command goes on")


def test_a_stop_is_raised_at_once_but_not_where_one_trains():
    stop = Stop()
    with stop.training():
        stop.ask()
        assert stop()
    with pytest.raises(Stopped):
        Stop().ask()
    assert not issubclass(Stopped, Exception)  # nothing that expects errors catches it


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 10])
def test_kills(number, tmp_path):
    """100 of them: python tests/kill_runs.py."""
    assert kill_runs.kill_runs(number, tmp_path, random.Random(number)) >= 1


@pytest.mark.slow
def test_a_full_disk_during_a_save_is_one_sentence_and_harms_no_checkpoint(tmp_path):
    """Files may not grow beyond 40 kB, which configurations need and checkpoints do not have."""
    whole = start(tmp_path / "whole")
    process = start(tmp_path / "run")
    wait_for_epochs(process, tmp_path / "run", 1)
    process.kill()
    process.communicate()
    _, err = (full := start(tmp_path / "run", "ulimit -f 40")).communicate(timeout=300)
    assert full.returncode == 1, err
    last_line = err.strip().splitlines()[-1]  # TensorStore's threads may have complained before
    assert last_line.startswith("error: cannot save a checkpoint in "), err
    assert last_line.endswith("make space there and start again") and "/rlrr_jax/" not in err
    _, err = (last := start(tmp_path / "run")).communicate(timeout=300)
    assert last.returncode == 0, err
    whole.communicate(timeout=300)
    assert kill_runs.contents(tmp_path / "run") == kill_runs.contents(tmp_path / "whole")
