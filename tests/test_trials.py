"""Trials trained together: each as if alone, killed and resumed, split where memory is short."""

import json
import os
import pathlib
import signal
import time
from types import SimpleNamespace

import forked
import jax
import numpy as np
import pytest
import safetensors.numpy
from float64 import near
from marks import quick
from squeeze import squeeze

from rlrr_jax import config as config_lib
from rlrr_jax import evaluate, files, models, suite, train
from rlrr_jax import job as job_lib
from rlrr_jax import run as run_lib
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.runs import identity
from rlrr_jax.runs import workdir as workdir_lib
from rlrr_jax.runtime import clock
from rlrr_jax.runtime.memory import TooLarge
from rlrr_jax.runtime.stop import Stop, Stopped

ROOT = pathlib.Path(__file__).parents[1]
TRIALS = ({"lr": (0.02, 0.005), "drop_path": (0.0, 0.2)}, {"weight_decay": 0.1, "seed": 3})
FOLDERS = (
    *("seed0-lr0.02-drop_path0", "seed0-lr0.02-drop_path0.2", "seed0-lr0.005-drop_path0"),
    *("seed0-lr0.005-drop_path0.2", "seed3-weight_decay0.1"),
)


def config(arg="digits,method=rlrr", **changes):
    config = vtab.get_config(arg)
    config.model.depth = 2  # which compiles in half the time
    with config.unlocked():
        config.update({"epochs": 2, "num_devices": 1, **changes})
    return config


def run(config, workdir):
    rows, problems = suite.run(config, workdir)
    assert not problems
    return rows


def adapter(folder):
    return safetensors.numpy.load_file(folder / "adapter.safetensors")


def assert_equal_but_for_rounding(ours, theirs):
    """Two folders of the same trial: losses, accuracies and trained values."""
    assert (ours / "adapter.safetensors").exists()
    for a, b in zip(*(files.read_rows(f / "metrics.jsonl") for f in (ours, theirs)), strict=True):
        assert a["lr"] == b["lr"] and a["train_loss"] == pytest.approx(b["train_loss"], abs=5e-3)
        assert a["train_acc"] == pytest.approx(b["train_acc"], abs=0.01)
    a, b = (files.read_json(f / "result.json") for f in (ours, theirs))
    assert a["identity"] == b["identity"]
    assert a["test_acc_final"] == pytest.approx(b["test_acc_final"], abs=0.01)
    a, b = map(adapter, (ours, theirs))
    for name in a:
        if "key/shift" not in name:  # rounding noise, which Adam turns into steps of lr
            near(a[name], b[name], 0.03, name)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("group")
    return workdir, run(config(runs=TRIALS), workdir)


def test_each_trial_has_its_row_and_folder(group):
    workdir, rows = group
    assert [workdir_lib.run_folder(row) for row in rows] == list(FOLDERS)
    assert {path.name for path in (workdir / "digits/rlrr").iterdir()} == set(FOLDERS)
    assert [(r["lr"], r["drop_path"], r["seed"]) for r in rows[:4]] == [
        (lr, rate, 0) for lr in (0.02, 0.005) for rate in (0.0, 0.2)
    ]
    assert (rows[4]["weight_decay"], rows[4]["seed"]) == (0.1, 3)
    assert {row["trained_together"] for row in rows} == {5}
    assert len({row["train_loss"] for row in rows}) == 5
    text = (workdir / "results.md").read_text()
    assert "| digits | rlrr depth=2 lr=0.005 drop_path=0.2 " in squeeze(text)
    assert "| digits | rlrr depth=2 seed 3 weight_decay=0.1 " in squeeze(text)
    assert len(json.loads((workdir / "results.json").read_text())) == 5


@pytest.mark.parametrize("number", quick([0, 3, 4], 0))
def test_a_trial_equals_the_same_trial_alone(group, number, tmp_path):
    workdir, rows = group
    keys = ("lr", "weight_decay", "drop_path")
    alone = config(seeds=(rows[number]["seed"],), **{key: rows[number][key] for key in keys})
    (row,) = run(alone, tmp_path)
    assert row["trained_together"] == 1 and row["trial"] is None
    ours = workdir / "digits/rlrr" / FOLDERS[number]
    assert_equal_but_for_rounding(ours, tmp_path / "digits/rlrr" / f"seed{row['seed']}")


@pytest.mark.slow
def test_four_devices_share_the_trials(group, tmp_path):
    workdir, _ = group
    again = run(config(runs=TRIALS[:1], num_devices=4), tmp_path)  # a mesh of 4 x 1
    assert [row["device"] for row in again] == ["4 x cpu"] * 4
    for name in FOLDERS[:4]:
        assert_equal_but_for_rounding(tmp_path / "digits/rlrr" / name, workdir / "digits/rlrr" / name)


def start(workdir):
    trials = "({'lr':(0.02,0.005),'drop_path':(0.0,0.2)},)"
    command = ["rlrr_jax.main", "--config=configs/vtab.py:digits,method=rlrr"]
    command += ["--config.epochs=3", "--config.protocol=official", "--config.checkpoint_seconds=0"]
    return forked.start([*command, f"--config.runs={trials}", f"--workdir={workdir}"])


def contents(workdir):
    """All that is no time."""
    out = {}
    for path in sorted(workdir.rglob("*")):
        if path.name in ("result.json", "metrics.jsonl"):
            rows = files.read_rows(path) if path.suffix == ".jsonl" else [files.read_json(path)]
            times = ("wall_seconds", "images_per_second", "seconds")
            out[path.relative_to(workdir)] = [
                {k: v for k, v in r.items() if k not in times} for r in rows
            ]
        elif path.name == "adapter.safetensors":
            out[path.relative_to(workdir)] = path.read_bytes()
    return out


@pytest.mark.slow
def test_a_killed_group_goes_on_as_the_same_group(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = start(whole)
    process = start(broken)
    rows = lambda: len(files.read_rows(broken / "digits/rlrr" / FOLDERS[0] / "metrics.jsonl"))
    for _ in range(120 * 50):
        if rows() >= 2:
            break
        assert process.poll() is None, process.stderr
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(broken.glob("digits/rlrr/*/result.json"))
    out, err = (last := start(broken)).communicate(timeout=300)
    assert last.returncode == 0, err
    assert "[1-4/4] digits rlrr, 4 trials: goes on at epoch" in out
    assert reference.communicate(timeout=300) and reference.returncode == 0
    assert len(contents(whole)) == 12 and contents(broken) == contents(whole)
    assert {p.name for p in (broken / "digits/rlrr").iterdir()} == set(FOLDERS[:4])


@pytest.mark.slow
def test_killed_between_two_results(tmp_path, monkeypatch):
    """The group is the same again, though one of it has its result."""
    settings = config("digits,method=linear", seeds=(0, 1, 2))
    run(settings, tmp_path / "whole")
    write_json = files.write_json

    def die(path, value):
        if path.name == "result.json" and [*tmp_path.glob("broken/*/*/*/result.json")]:
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(files, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        suite.run(settings, tmp_path / "broken")
    monkeypatch.undo()
    assert len([*tmp_path.glob("broken/*/*/*/result.json")]) == 1
    run(settings, tmp_path / "broken")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "broken/digits/linear").iterdir()} == {
        "seed0",
        "seed1",
        "seed2",
    }


@pytest.mark.slow
def test_added_seeds_leave_finished_ones_alone(tmp_path, capsys):
    (first,) = run(config("digits,method=linear", seeds=(0,)), tmp_path)
    other = tmp_path / "digits/linear/together-other"
    other.mkdir()
    files.write_json(other / "runs.json", {"runs": ["seed2", "seed9"]})  # killed before it was done
    rows = run(config("digits,method=linear", seeds=(0, 1, 2)), tmp_path)
    assert rows[0] == first
    assert [row["trained_together"] for row in rows] == [1, 2, 2]
    assert f"note: {other} was begun with other runs, too: these start again" in capsys.readouterr().out


@pytest.mark.slow
def test_trials_that_do_not_fit_are_trained_in_groups(group, tmp_path, monkeypatch, capsys):
    needs, check_memory = [], job_lib.check_memory

    def check(job, need, limit):
        needs.append(need.argument_size_in_bytes + need.temp_size_in_bytes)
        return check_memory(job, need, needs[0] / 2)

    monkeypatch.setattr(job_lib, "check_memory", check)
    rows = run(config(runs=TRIALS), tmp_path)
    together = [row["trained_together"] for row in rows]
    assert sum(1 / n for n in together) == pytest.approx(3) and max(together) == 2, together
    assert "[1-5/5] digits rlrr, 5 trials: 2 fit into memory at once" in capsys.readouterr().out
    assert max(needs[1:]) < needs[0] / 2
    for name in FOLDERS:
        assert_equal_but_for_rounding(tmp_path / "digits/rlrr" / name, group[0] / "digits/rlrr" / name)


@pytest.mark.parametrize(
    ("trials", "devices", "limit", "remat", "fits"),
    [
        (8, 1, 95, None, None),
        (8, 1, 94, None, 7),
        (8, 1, 65, None, 5),
        (8, 2, 45, None, 6),
        (8, 1, 20, None, 0),
        (8, 1, 20, True, 1),
        (8, 1, 20, False, 1),
        (1, 1, 20, None, 0),
        (1, 1, 20, True, None),
    ],
)
def test_how_many_fit(trials, devices, limit, remat, fits):
    """15 bytes are shared, each trial on a device takes 10."""
    run = SimpleNamespace(limits=run_lib.Limits(recompute=remat))
    job = SimpleNamespace(
        mesh=SimpleNamespace(shape={"trial": devices}),
        runs=[run] * trials,
        frozen=np.zeros(10, np.uint8),
        data=np.zeros(5, np.uint8),
        feed=SimpleNamespace(renewed=False),
    )
    here = trials // devices
    needs = SimpleNamespace(argument_size_in_bytes=15 + here, temp_size_in_bytes=9 * here)
    if fits is None:
        job_lib.check_memory(job, needs, limit)
    else:
        with pytest.raises(TooLarge) as e:
            job_lib.check_memory(job, needs, limit)
        assert e.value.fits == fits


REFUSED = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm"


@pytest.mark.parametrize(
    "trials, remat, fits", [(8, None, 4), (2, True, 0), (6, True, 2), (2, None, 0)]
)
def test_what_a_compiler_refuses_is_divided(trials, remat, fits):
    """On two devices; a single trial computes twice, and then there is nothing left to do."""
    run = SimpleNamespace(limits=run_lib.Limits(recompute=remat), label="digits rlrr")
    job = SimpleNamespace(mesh=SimpleNamespace(shape={"trial": 2}), runs=[run] * trials)
    kind = UserError if trials == 2 and remat else TooLarge
    with pytest.raises(kind) as e:
        with job_lib.fitting(job):
            raise jax.errors.JaxRuntimeError(REFUSED)
    if kind is TooLarge:
        assert e.value.fits == fits
    else:
        assert "though activations are computed twice: raise config.accumulate" in str(e.value)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), job_lib.fitting(job):
        raise jax.errors.JaxRuntimeError("INTERNAL: another")


@pytest.mark.slow
def test_a_trial_that_does_not_fit_computes_twice(tmp_path, monkeypatch, capsys):
    settings = config("digits,method=rlrr", epochs=1)
    settings.model.depth = None  # all blocks: the more there are, the more it saves
    plain = run(settings, tmp_path / "plain")
    needs, check_memory = [], job_lib.check_memory

    def check(job, need, limit):
        needs.append(need.temp_size_in_bytes)
        return check_memory(job, need, 1)

    monkeypatch.setattr(job_lib, "check_memory", check)
    monkeypatch.setattr(models, "default_unroll", lambda variant: 1)
    again = run(settings, tmp_path / "again")
    assert needs[1] < 0.75 * needs[0]
    assert "not enough memory, so activations are computed twice" in capsys.readouterr().out
    assert again[0]["identity"] == plain[0]["identity"]
    assert again[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], abs=0.01)
    assert files.read_json(tmp_path / "again/digits/rlrr/seed0/config.json")["model"]["remat"]
    assert run(settings, tmp_path / "again") == again


@pytest.mark.slow
def test_one_dispatch_per_epoch_and_one_compilation(tmp_path, monkeypatch, caplog):
    """Also for several trials; the first step of all is one by itself, to learn the speed."""
    dispatches = []
    compile_steps = job_lib.Job.compile

    def counted(*args):
        train_steps = compile_steps(*args)
        return lambda data, state, metrics, *chunk: (
            dispatches.append(chunk) or train_steps(data, state, metrics, *chunk)
        )

    monkeypatch.setattr(job_lib.Job, "compile", counted)
    monkeypatch.setattr(clock, "DISPATCH_SECONDS", 1e6)
    job_lib.forget()
    for number, changes in enumerate(({}, {"runs": TRIALS})):
        dispatches.clear()
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            settings = config("digits,method=linear", epochs=2, protocol="official", **changes)
            run(settings, tmp_path / str(number))
        assert dispatches == [(0, 0, 1), (0, 1, 32), (1, 0, 32)]
        compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
        for program in ("train_steps", "eval_step"):
            assert sum(program in text for text in compiled) == 1, compiled


def resolve(**changes):
    return config_lib.resolve(config("cifar", **changes))


def test_trials_and_seeds_multiply():
    runs = resolve(runs=({"lr": (1e-3, 1e-2)}, {"drop_path": 0.3, "seed": 9}), seeds=(0, 1))
    assert [(r.lr, r.drop_path, r.seed, r.trial) for r in runs] == [
        (1e-3, 0.1, 0, "lr0.001"),
        (1e-3, 0.1, 1, "lr0.001"),
        (1e-2, 0.1, 0, "lr0.01"),
        (1e-2, 0.1, 1, "lr0.01"),
        (3e-3, 0.3, 9, "drop_path0.3"),
    ]
    assert len({identity.together(r) for r in runs}) == 1


def test_a_trial_is_the_same_work_as_a_run_with_that_value():
    (trial,), (alone,) = resolve(runs=({"lr": 0.5},)), resolve(lr=0.5)
    assert identity.fingerprint([trial]) == identity.fingerprint([alone])
    assert identity.together(alone) != identity.together(resolve(batch_size=64)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": ({"lrr": 1},)}, "unknown option of method rlrr 'lrr': did you mean 'lr'"),
        ({"runs": ("lr",)}, "must be a list, such as"),
        ({"runs": ()}, "must be a list, such as"),
        ({"runs": ({"lr": 1e-3}, {"lr": 1e-3})}, "must be different runs"),
        ({"runs": ({"lr": ()},)}, "must have values for lr"),
        ({"runs": ({"lr": -1.0},)}, "config.lr=-1.0 must be greater than 0"),
        ({"runs": ({"lr": "high"},)}, "lr='high' has the wrong type"),
        ({"runs": ({"epochs": "many"},)}, "epochs='many' has the wrong type"),
        ({"runs": ({"batch_size": (16, 0)},)}, "config.batch_size=0 must be greater than 0"),
        ({"runs": ({"drop_path": (0.1, 1.0)},)}, "config.drop_path=1.0 must be at least 0"),
        ({"runs": ({"seed": 1.5},)}, "config.runs.seed=1.5 must be a whole number"),
        ({"runs": ({"task": "dtd"},)}, "config.runs cannot change task: set config.task for all runs"),
        ({"runs": ({"num_devices": 2},)}, "cannot change num_devices"),
        ({"runs": ({"grid.lr": (0.1,)},)}, "cannot change grid.lr"),
    ],
)
def test_impossible_trials(changes, message):
    with pytest.raises(UserError, match=message):
        resolve(**changes)


@pytest.mark.slow
def test_trials_are_evaluated_in_turn_where_merged_trees_do_not_fit(group, tmp_path, monkeypatch):
    """18 merged trees of an L/16 take 20 GiB: fewer at once give the same answers."""
    _, rows = group
    monkeypatch.setattr(evaluate, "at_once", lambda job, limit: 1)
    again = run(config(runs=TRIALS), tmp_path)
    keys = ("test_acc_final", "train_loss", "identity")
    assert [[row[k] for k in keys] for row in again] == [[row[k] for k in keys] for row in rows]


@pytest.mark.parametrize(
    ("trials", "groups", "limit", "fits"),
    [
        (18, 1, 1000, 18),
        (18, 1, 160, 9),
        (18, 1, 100, 6),
        (18, 1, 20, 1),
        (18, 2, 100, 3),
        (5, 1, 61, 1),
    ],
)
def test_how_many_are_evaluated_at_once(trials, groups, limit, fits):
    """A merged tree has 10 bytes, weights and data 15, a fifth of the rest is for activations."""
    job = SimpleNamespace(
        mesh=SimpleNamespace(shape={"trial": groups}),
        init_keys=range(trials),
        frozen=np.zeros(10, np.uint8),
        data=np.zeros(5, np.uint8),
    )
    assert evaluate.at_once(job, limit) == fits


@pytest.mark.slow
def test_three_trials_on_four_devices_are_resumed_on_one(tmp_path, monkeypatch):
    """Their checkpoint has three, though four were trained: the mesh may differ after a stop."""
    stop = Stop()
    settings = config("digits,method=linear", seeds=(0, 1, 2), num_devices=4, checkpoint_seconds=0.0)
    train_part = train.train_part

    def then_stop(*args):
        out = train_part(*args)
        stop.asked = True
        return out

    monkeypatch.setattr(train, "train_part", then_stop)
    with pytest.raises(Stopped):
        suite.run(settings, tmp_path, stop)
    monkeypatch.undo()
    settings.num_devices = 1
    rows = run(settings, tmp_path)
    whole = run(config("digits,method=linear", seeds=(0, 1, 2)), tmp_path / "whole")
    for a, b in zip(rows, whole, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=5e-3)
        assert a["trained_together"] == 3 and a["identity"] == b["identity"]


@pytest.mark.slow
def test_goes_on_elsewhere_with_a_note(tmp_path, monkeypatch, capsys):
    """Bits are promised for the same devices and cores alone."""
    settings = config("digits,method=linear", checkpoint_seconds=0.0, epochs=3)
    stop, evaluate_epoch = Stop(), train.evaluate_epoch

    def then_stop(job, progress, check):
        stop.asked = progress.epoch == 1
        check()
        return evaluate_epoch(job, progress, check)

    monkeypatch.setattr(train, "evaluate_epoch", then_stop)
    with pytest.raises(Stopped):
        suite.run(settings, tmp_path, stop)
    monkeypatch.undo()
    cores = len(os.sched_getaffinity(0))
    path = tmp_path / "digits/linear/seed0/config.json"
    saved = files.read_json(path)
    assert saved["machine"] == {"devices": 1, "kind": "cpu", "cores": cores}
    files.write_json(path, {**saved, "machine": {**saved["machine"], "cores": 99}})
    capsys.readouterr()
    (row,) = run(settings, tmp_path)
    out = capsys.readouterr().out
    assert "goes on at epoch 2" in out and row["cores"] == cores
    assert f"begun on 1 x cpu (99 cores) and goes on on 1 x cpu ({cores} cores): sums are taken" in out
