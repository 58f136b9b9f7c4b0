"""`python -m rlrr_jax.plan`: its shapes are those of a run, its groups those that a suite trains."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest
from marks import quick

from rlrr_jax import backend, job, models, suite
from rlrr_jax import config as config_lib
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.plan import groups, outline, page, topology
from rlrr_jax.runs import group, parts
from rlrr_jax.runs.forecast import duration
from rlrr_jax.runtime import memory

ROOT = pathlib.Path(__file__).parents[2]


def config(arg, **changes):
    config = vtab.get_config(arg)
    config.update_from_flattened_dict({"epochs": 1, "model.depth": 2, **changes})
    return config


class Built(Exception):
    pass


CASES = {
    "three seeds on four devices": ("digits,method=rlrr", {"seeds": (0, 1, 2)}),
    "an average, mixing": ("hearts,method=bitfit", {"average": 0.5, "mixup": 0.2}),
    "the head alone, flipped": ("hearts,method=linear", {"flip": True}),
    "the last block": ("digits,method=last", {"drop_path": 0.0, "model.depth": 3}),
    "streamed": ("digits,method=ssf", {"data.device_gb": 1e-3, "num_devices": 1}),
}


@pytest.mark.parametrize("case", quick(CASES, "three seeds on four devices", "an average, mixing"))
def test_what_is_compiled_is_what_a_run_compiles(case, tmp_path, monkeypatch):
    """Recipe, shapes, dtypes and shardings of everything that a job has."""
    arg, changes = CASES[case]
    jobs, build = [], job.build

    def stop(*arguments):
        jobs.append(build(*arguments))
        raise Built

    monkeypatch.setattr(job, "build", stop)
    with pytest.raises(Built):
        suite.run(config(arg, **changes), tmp_path)
    (real,) = jobs
    ours = outline.of(real.runs, jax.devices())
    assert ours.recipe == real.recipe and ours.mesh == real.mesh
    assert ours.feed.shard == real.feed.shard and ours.feed.renewed == real.feed.renewed
    assert ours.held_out[0].shape == real.held_out[0].shape
    described = lambda x: (x.shape, x.dtype, x.sharding)
    for name in ("frozen", "data", "hyper", "init_keys"):
        a, b = (jax.tree.map(described, getattr(each, name)) for each in (ours, real))
        assert a == b, name
    for a, b in zip(ours.shapes(), real.shapes()):
        assert jax.tree.map(described, a) == jax.tree.map(described, b)


@pytest.mark.parametrize(
    "arg, changes",
    [
        ("hearts,digits,method=linear+rlrr", {"seeds": (0, 1)}),
        ("digits,method=rlrr", {"protocol": "vtab", "grid.lr": (0.01, 0.1), "seeds": (0, 1)}),
        ("digits,method=rlrr", {"runs": ({"lr": (0.1, 0.2)}, {"seed": 4})}),
    ],
    ids=str,
)
def test_groups_are_those_of_a_suite(arg, changes, tmp_path, monkeypatch):
    seen = []

    rows = lambda works: [{"val_acc": 0.5, "train_loss": 1.0, **w.run.to_dict()} for w in works]

    def finish(works, **rest):
        seen.append([(w.run.protocol, w.run.seed, w.run.trial) for w in works])
        return rows(works)

    monkeypatch.setattr(group, "finish", finish)
    monkeypatch.setattr(suite.report, "collect", lambda folder: None)
    suite.run(config(arg, **changes), tmp_path)
    ours = groups.together(config_lib.resolve(config(arg, **changes)))
    assert [[(run.protocol, run.seed, run.trial) for run in runs] for runs in ours] == seen


def planned(arg, limit, **changes):
    """Groups on a CPU device that is said to have a memory of its own."""
    chip = topology.Chip("cpu", limit, 1e10, 1e11, 2e10, 1e9)
    devices = topology.Topology("cpu:1", chip, jax.devices()[:1])
    with backend.compiling_for("cpu", 1, int(limit)):
        return groups.measured(config(arg, **changes), devices, print), devices


@pytest.mark.slow
def test_what_does_not_fit_is_divided_and_then_computed_twice(capsys):
    arg, changes = "digits,method=rlrr", {"seeds": (0, 1, 2, 3), "model.unroll": 1}
    (whole,), _ = planned(arg, 2**34, **changes)
    found = whole.programs["train"]
    needs = found.compiled.memory_analysis()
    bytes_ = needs.argument_size_in_bytes + needs.temp_size_in_bytes
    assert whole.runs == 4 and not whole.remat and needs.temp_size_in_bytes == found.temporary
    capsys.readouterr()
    few, _ = planned(arg, 0.6 * bytes_, **changes)
    assert [each.runs for each in few] == [
        2,
        2,
    ] and "2 fit into memory at once" in capsys.readouterr().out
    assert few[0].programs is not few[1].programs
    assert few[0].programs["train"] is few[1].programs["train"]  # compiled once
    (last, *_), devices = planned(arg, 0.1 * bytes_, **{**changes, "seeds": (0,)})
    assert last.remat and "so activations are computed twice (model.remat)" in capsys.readouterr().out
    text = page.text(devices, [last])
    assert "Activations are computed twice (model.remat)" in text
    assert "A step of digits rlrr does not fit: it takes 0.0 GiB of 0.0. " in text
    (fits, *_), devices = planned(arg, bytes_, **{**changes, "seeds": (0,)})
    assert "does not fit" not in page.text(devices, [fits])


def test_seeds_whose_images_are_streamed_are_planned_one_after_another():
    found, _ = planned("digits,method=bitfit", 2**34, seeds=(0, 1), **{"data.device_gb": 1e-3})
    assert [each.runs for each in found] == [1, 1]


@pytest.mark.slow
def test_seconds_are_turns_of_the_roofline():
    (found,), devices = planned("digits,method=rlrr", 2**34, epochs=3, protocol="official")
    train, evaluated = found.programs["train"], found.programs["evaluate"]
    assert train.turn == pytest.approx(max(train.flops / 2e10, train.moved / 1e10))  # float32
    assert found.seconds["train"] == pytest.approx(3 * 32 * train.turn)  # 1000 images by 32
    # The test images are seen after all epochs but the first, 797 by 256.
    assert found.seconds["evaluate"] == pytest.approx(2 * 4 * evaluated.turn)
    assert found.seconds["merge"] == pytest.approx(2 * found.programs["merge"].turn)
    # A step is 3 passes over 32 images without the gradient of frozen first layers, a batch 256 images.
    assert 2 < (train.flops / 32) / (evaluated.flops / 256) <= 3
    text = page.text(devices, [found])
    assert "| rlrr" in text and "of chips" in text


@pytest.mark.slow
def test_parts_are_those_of_a_run_and_the_longest_decides():
    argument, number = "task=hearts+digits,method=linear+rlrr", 3
    chip = topology.Chip("cpu", 2**34, 1e10, 1e11, 2e10, 1e9)
    devices = topology.Topology("cpu:1", chip, jax.devices()[:1])
    with backend.compiling_for("cpu", 1, 2**34):
        found = groups.measured(config(argument), devices, print, number)
    runs = config_lib.resolve(config(argument))
    for i in range(1, number + 1):
        share = [f"{run.task} {run.method}" for run in parts.share(runs, parts.Part(i, number))]
        assert [group.label for group in found if group.part == i] == share and share
    loads = [
        sum(sum(group.seconds.values()) for group in found if group.part == i + 1)
        for i in range(number)
    ]
    text = page.text(devices, found, number)
    assert text.startswith("each of 3 parts on cpu:1: 1 devices; ")
    assert (
        f"The longest part takes {duration(max(loads))}, the shortest {duration(min(loads))}: 3 chips "
        f"until the longest ends are {duration(3 * max(loads))} of chips."
    ) in text


@pytest.mark.parametrize(
    ("name", "number", "own"),
    [
        *(("v5e:4x4", 16, "v5e:1x1"), ("v5e:4x4", 4, "v5e:2x2"), ("v5p:2x2x4", 16, "v5p:1x1x1")),
        *(("h100:8", 4, "h100:2"), ("cpu:8", 8, "cpu:1"), ("v5e", 2, "v5e"), ("v6e:8x8", 8, "v6e:2x4")),
    ],
)
def test_the_devices_of_a_part(name, number, own):
    assert topology.share(name, number) == own


@pytest.mark.parametrize(("name", "number"), [("v5e:4x4", 3), ("v5e:4x4", 1), ("h100:2", 4)])
def test_devices_that_do_not_divide(name, number):
    with pytest.raises(UserError, match=f"{name} does not divide into {number} parts of a host's"):
        topology.share(name, number)


def test_first_blocks_that_are_computed_once_are_counted():
    (found,), _ = planned("hearts,method=linear", 2**34, flip=True)
    first, turns = found.programs["first blocks"], 16 + 32  # 1000 and 2000 images by 64
    assert found.seconds["first blocks"] == pytest.approx(turns * first.turn)
    (whole,), _ = planned("hearts,method=rlrr", 2**34)
    forward = whole.programs["evaluate"].flops / 256
    assert first.flops / 64 == pytest.approx(2 * forward, rel=0.05)  # as they are, and flipped


def test_the_command(tmp_path):
    words = ["--config=configs/vtab.py:hearts,method=bitfit", "--topology=cpu:4", f"--out={tmp_path}"]
    words += ["--config.seeds=(0,1)", "--config.model.depth=1"]
    done = subprocess.run(
        [sys.executable, "-m", "rlrr_jax.plan", *words],
        **dict(cwd=ROOT, capture_output=True, text=True),
    )
    assert done.returncode == 0, done.stderr
    assert "compiling: train, hearts bitfit, 2 trials on 4 devices (trial " in done.stdout
    text = (tmp_path / "plan.md").read_text()
    assert text.rstrip() in done.stdout and "nothing is known of these devices' speed" in text
    whole = json.loads((tmp_path / "plan.json").read_text())
    (found,) = whole["groups"]
    assert whole["devices"] == 4 and found["runs"] == 2 and found["seconds"] == {}
    assert found["programs"]["train"]["collectives"]["all-reduce"][0] >= 1
    model = models.build("bundled", 16, depth=1)
    assert found["programs"]["train"]["arguments"]["weights"] == memory.size(models.shapes(model, 32))


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5:2x2", "unknown topology 'v5:2x2': did you mean 'v5p:2x2'"),
        ("v5e", "the topology v5e has no number or shape of devices: write v5e:4x4, h100:1 or cpu:8"),
        ("h100:1x1", "the topology h100:1x1 has no number or shape"),
        ("cpu:0", "the topology cpu:0 has no number or shape"),
        ("h100:9", "the topology h100:9 has no number or shape"),
    ],
)
def test_a_wrong_topology_is_one_sentence(name, message):
    with pytest.raises(UserError, match=message.replace("?", ".")):
        topology.find(name)
