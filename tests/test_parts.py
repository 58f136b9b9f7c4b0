"""Runs dealt out: every process takes its share, by itself, and no run is lost or trained twice."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flags import xla_flags
from safetensors.numpy import load_file

from rlrr_jax import adapters as adapters_lib
from rlrr_jax import config as config_lib
from rlrr_jax import files, report, suite
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.runs import parts, search, workdir
from rlrr_jax.runs.parts import Part
from rlrr_jax.runtime import distributed

ROOT = pathlib.Path(__file__).parents[1]
SURROUNDINGS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


def config(argument="task=hearts+digits,method=linear+rlrr", **values):
    found = vtab.get_config(argument)
    with found.unlocked():
        found.update_from_flattened_dict({"eval_every": 1, **values})
    return found


def labels(runs):
    return [(run.task, run.method, run.options, run.seed, run.trial) for run in runs]


# The deal -------------------------------------------------------------------------------------


def shares(runs, of):
    return [parts.share(runs, Part(i + 1, of)) for i in range(of)]


def test_each_run_is_in_one_share_and_the_shares_cost_alike():
    runs = config_lib.resolve(config("task=all,method=linear+rlrr"))
    every = shares(runs, 4)  # 38 groups
    assert sorted(label for share in every for label in labels(share)) == sorted(labels(runs))
    cost = [sum(map(parts.passes, share)) for share in every]
    assert max(cost) < 1.1 * min(cost)
    for share in every:  # seeds stay together
        seeds = {}
        for task, method, _, seed, _ in labels(share):
            seeds.setdefault((task, method), set()).add(seed)
        assert set(map(tuple, seeds.values())) == {(0, 1, 2)}
        assert labels(share) == [label for label in labels(runs) if label in labels(share)]


def test_the_dearest_comes_first_and_ties_go_to_the_first_part():
    runs = config_lib.resolve(config("task=hearts+digits"))
    names = [[label[:2] for label in labels(share)] for share in shares(runs, 2)]
    assert names == [
        [("hearts", "rlrr"), ("digits", "linear"), ("digits", "rlrr")],
        [("hearts", "linear"), ("hearts", "full"), ("digits", "full")],
    ] or names == [
        [("hearts", "linear"), ("hearts", "rlrr"), ("digits", "rlrr")],
        [("hearts", "full"), ("digits", "linear"), ("digits", "full")],
    ]


def test_what_is_computed_once_costs_little():
    linear, rlrr = config_lib.resolve(config("hearts,method=linear+rlrr"))
    assert parts.passes(linear) == pytest.approx((1000 + 2000) / 3)
    assert parts.passes(rlrr) == pytest.approx(12 * 1000 + 2000 / 3)


def test_a_search_counts_once_and_stays_with_its_runs():
    runs = config_lib.resolve(config("task=all,method=rlrr", protocol="vtab"))
    every = shares(runs, 19)
    assert all(len(share) == 3 and len({run.task for run in share}) == 1 for share in every)
    # One task that searches 18 settings, one that has none: 3 + 0.8 x 18 runs against 3.
    (searching, *_), plain = runs[:3], config_lib.resolve(config("task=all,method=rlrr"))
    mixed = [*runs[:3], *plain[3 : 3 + 3 * 5]]
    first, second = (labels(share) for share in shares(mixed, 2))
    assert {label[0] for label in first} == {searching.task}
    assert len(second) == 15
    assert len(search.settings(searching)) == 18


def test_more_parts_than_there_is_work_for():
    runs = config_lib.resolve(config())
    every = shares(runs, 6)
    assert [len(share) for share in every] == [1, 1, 1, 1, 0, 0]


def test_groups_are_counted_without_any_device():
    """In a process in which JAX has no device."""
    code = (
        "from rlrr_jax import config; from rlrr_jax.configs import vtab; import jax\n"
        "names = 'task=all,method=linear+rlrr', 'hearts,method=rlrr', ''\n"
        "for name in names: print(config.groups(vtab.get_config(name)))\n"
        "c = vtab.get_config('cifar'); c.runs = ({'rank': (1, 2), 'lr': (1e-3, 1e-2)},)\n"
        "print(config.groups(c))\n"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["38", "1", "6", "2"], done.stderr


# Which part a process is ----------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    for name in (*SURROUNDINGS, *(name for name in os.environ if name.startswith("SLURM"))):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "x", "a/b", "-1/2", ""])
def test_a_part_that_is_none(alone, text):
    with pytest.raises(UserError) as e:
        parts.chosen(text, config())
    assert str(e.value) == (
        f"--part={text} is no part: write a number and how many, such as 3/8, or off"
    )


def test_by_hand_or_not_at_all(alone):
    assert parts.chosen("3/8", config()) == Part(3, 8)
    assert parts.chosen("auto", config()) is None
    assert parts.chosen("off", config()) is None


def test_announced_processes_deal_where_there_is_enough(alone):
    alone.setenv("JAX_NUM_PROCESSES", "4")
    alone.setenv("JAX_PROCESS_ID", "3")
    assert parts.chosen("auto", config()) == Part(4, 4)
    assert parts.chosen("off", config()) is None
    assert parts.chosen("2/3", config()) == Part(2, 3)
    alone.setenv("JAX_NUM_PROCESSES", "5")  # and four groups
    assert parts.chosen("auto", config()) is None


def test_processes_of_slurm_see_their_own_gpu_alone(alone):
    for name, value in dict(
        JOB_ID=1, NTASKS=8, STEP_NUM_TASKS=4, PROCID=3, LOCALID=1, STEP_NODELIST="node[001-002]"
    ).items():
        alone.setenv(f"SLURM_{name}", str(value))
    shown = {}
    alone.setattr(jax.config, "update", lambda key, value: shown.update({key: value}))
    assert distributed.announced() == distributed.Announced(8, 3, "1")
    alone.setenv("JAX_NUM_PROCESSES", "8"), alone.setenv("JAX_PROCESS_ID", "5")
    assert distributed.announced() == distributed.Announced(8, 5, "1")  # joining takes it, too
    alone.setenv("JAX_LOCAL_DEVICE_IDS", "2,3")
    assert distributed.announced() == distributed.Announced(8, 5, "2,3")
    for name in ("NUM_PROCESSES", "PROCESS_ID", "LOCAL_DEVICE_IDS"):
        alone.delenv(f"JAX_{name}")
    alone.setenv("SLURM_NTASKS", "4")
    assert parts.chosen("auto", config()) == Part(4, 4)
    assert shown == {"jax_cuda_visible_devices": "1", "jax_rocm_visible_devices": "1"}
    alone.setenv("SLURM_NTASKS", "1"), alone.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert distributed.announced() is None  # one task, which has all GPUs of its node


def test_a_host_of_a_tpu_slice_sees_its_own_chips_alone(alone):
    names = "TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS"
    for name in (*names, "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        alone.setenv(name, "")
    alone.setattr(
        distributed.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, "0x0063")
    )
    distributed.stay_apart(distributed.Announced(4, 2))
    assert [os.environ[name] for name in names] == ["1,1,1", "2,2,1", "0,1,2,3"]
    distributed.check_apart(60)
    alone.setenv("TPU_VISIBLE_CHIPS", "2"), alone.setenv("TPU_PROCESS_BOUNDS", "1,1,2")
    distributed.stay_apart(distributed.Announced(4, 2))  # as launch/local.sh has set
    assert [os.environ[name] for name in names[::2]] == ["1,1,2", "2"]
    alone.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="this process sees all 4 hosts of the TPU, .* add --part=off"):
        distributed.check_apart(60)


def test_a_single_host_of_a_tpu_keeps_what_the_script_has_set(alone):
    """JAX announces it, as one process."""
    alone.setattr(distributed, "announced", lambda: distributed.Announced(1, 0))
    alone.setattr(distributed, "stay_apart", lambda announced: 1 / 0)
    assert parts.chosen("3/4", config()) == Part(3, 4)
    assert parts.chosen("auto", config()) is None


# Training -------------------------------------------------------------------------------------

SHORT = {"total_steps": 2, "model.depth": 2, "checkpoint_seconds": 0.0}


def train(folder, part, **values):
    return suite.run(config(**{**SHORT, **values}), folder, part=part)


def adapters(folder):
    return {str(p.relative_to(folder)): load_file(p) for p in folder.glob("*/*/*/adapter.safetensors")}


def same(one, other):
    assert one.keys() == other.keys() and len(one) > 1
    for name in one:
        assert one[name].keys() == other[name].keys()
        assert all(np.array_equal(one[name][key], other[name][key]) for key in one[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder, None)
    return folder


def test_parts_give_the_bits_of_the_whole_and_restart_as_other_parts(whole, tmp_path, capsys):
    rows, problems = train(tmp_path, Part(1, 3))
    out = capsys.readouterr().out
    assert not problems and f"part 1/3: {len(rows)} of 4 runs\n" in out
    assert f"part 1/3: {len(rows)} run(s): " in out and "of 4 runs are finished" in out
    assert len(rows) in (1, 2)
    report.collect(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.count(": not begun") == 4 - len(rows)
    first = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*/*/result.json")}
    for part in (Part(2, 2), Part(1, 2)):  # as if the third had never been, and the number changed
        rows, problems = train(tmp_path, part)
    assert len(rows) == 4 and not problems
    assert {p: p.stat().st_mtime_ns for p in first} == first  # nothing is repeated
    assert "not finished" not in (tmp_path / "results.md").read_text()
    assert len(json.loads((tmp_path / "results.json").read_text())) == 4
    same(adapters(whole), adapters(tmp_path))
    for task, classes in (("digits", 10), ("hearts", 16)):
        # Trained with one head, saved with their own.
        (adapter, *_) = (whole / task).glob("*/*/adapter.safetensors")
        bias = adapters_lib.read(adapter).trainable["head"]["bias"]
        assert bias.shape == (classes,) and np.abs(bias).max() < 10


def test_a_folder_that_another_process_holds_is_passed_over_and_looked_at_again(tmp_path, capsys):
    mine = parts.share(config_lib.resolve(config(**SHORT)), Part(1, 2))
    held = tmp_path / mine[0].task / mine[0].method / "seed0"
    held.mkdir(parents=True)
    with files.lock(held):
        rows, problems = train(tmp_path, Part(1, 2))
    out = capsys.readouterr().out
    assert len(rows) == len(mine) - 1 and not problems and not (held / "error.txt").exists()
    assert (
        f"part 1/2: {mine[0].task} {mine[0].method} seed 0: left to the process that is training it\n"
        in out
    )
    rows, _ = train(tmp_path, Part(1, 2))
    assert len(rows) == len(mine)


def test_a_part_that_fails_says_so_and_the_other_has_its_rows(tmp_path, monkeypatch):
    share = parts.share(config_lib.resolve(config(**SHORT)), Part(2, 2))
    other = parts.share(config_lib.resolve(config(**SHORT)), Part(1, 2))
    train(tmp_path, Part(1, 2))
    monkeypatch.setattr(suite.group, "finish", lambda *a, **k: 1 / 0)
    rows, problems = train(tmp_path, Part(2, 2))
    assert len(problems) == len(share) and len(rows) == len(other)  # those of the other part
    text = (tmp_path / "results.md").read_text()
    assert text.count("ZeroDivisionError") == len(share)
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(other)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"runs": 3}', '{"runs": ["../x/y", "/etc/x/y", "a/../b", "a/b", ".a/b/seed0", 7]}'],
)
def test_a_list_of_runs_that_is_damaged_or_points_elsewhere_lists_nothing(tmp_path, text):
    (tmp_path / workdir.LIST).write_text(text)
    assert workdir.read_list(tmp_path) == []
    workdir.write_list(tmp_path, [tmp_path / "digits" / "rlrr" / "seed0"])
    assert workdir.read_list(tmp_path) == [tmp_path / "digits" / "rlrr" / "seed0"]


def test_a_part_without_runs(tmp_path, capsys):
    assert train(tmp_path, Part(6, 6)) == ([], {})
    assert "part 6/6: 0 of 4 runs\n" in capsys.readouterr().out


# Real processes -------------------------------------------------------------------------------


def start(workdir, *arguments, **environment):
    command = [sys.executable, "-m", "rlrr_jax.main", f"--workdir={workdir}", *arguments]
    place = {**os.environ, "XLA_FLAGS": xla_flags(), **environment}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=place, **pipes)


def ended(*processes):
    out = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), out
    return [text for text, _ in out]


ARGUMENTS = ("--config=configs/vtab.py:task=hearts+digits,method=linear+rlrr", "--config.total_steps=2")
ARGUMENTS += ("--config.model.depth=2",)


@pytest.mark.slow
def test_two_announced_processes_take_half_each_and_need_no_coordinator(whole, tmp_path):
    every = ended(
        *(start(tmp_path, *ARGUMENTS, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i)) for i in range(2))
    )
    for i, out in enumerate(every):
        assert f"part {i + 1}/2: 2 of 4 runs\n" in out
    assert "4 of 4 runs are finished" in "".join(every)
    one, other = (
        {name: tree["head/bias"] for name, tree in adapters(folder).items()}
        for folder in (whole, tmp_path)  # of four devices, and of one
    )
    assert len(one) == 4 and one.keys() == other.keys()
    assert all(np.allclose(one[name], other[name], atol=1e-5) for name in one)


@pytest.mark.slow
def test_a_part_that_is_killed_goes_on_alone_and_three_as_two(tmp_path):
    long = ("--config=configs/vtab.py", "--config.epochs=3", "--config.checkpoint_seconds=0")
    ended(start(tmp_path / "whole", *long))
    folder = tmp_path / "parts"
    one, two = (start(folder, *long, f"--part={i}/2") for i in (1, 2))
    while one.poll() is None and not list(folder.glob("*/rlrr/seed0/checkpoints/*/*")):
        time.sleep(0.05)
    one.send_signal(signal.SIGKILL)
    one.communicate()
    assert one.returncode == -signal.SIGKILL
    assert "6 of 6" not in ended(two)[0]
    assert "part 1/2: 6 of 6 runs are finished" in ended(start(folder, *long, "--part=1/2"))[0]
    same(adapters(tmp_path / "whole"), adapters(folder))
    folder = tmp_path / "three"
    three = [start(folder, *long, f"--part={i}/3") for i in (1, 2, 3)]
    while not list(folder.glob("*/*/seed0/checkpoints/*/*")):
        time.sleep(0.05)
    for process in three:
        process.terminate()
    assert {process.wait(60) for process in three} <= {0, 75}
    every = ended(*(start(folder, *long, f"--part={i}/2") for i in (1, 2)))
    assert "6 of 6 runs are finished" in "".join(every)
    same(adapters(tmp_path / "whole"), adapters(folder))
