"""The command, predict and export, on runs of the bundled model."""

import csv
import json
import sys

import numpy as np
import pictures
import pytest
from PIL import Image

from rlrr_jax import adapters, combine, export, suite
from rlrr_jax import config as config_lib
from rlrr_jax import predict as plain
from rlrr_jax.configs import vtab
from rlrr_jax.data import store
from rlrr_jax.errors import UserError
from rlrr_jax.projects.exits import __main__ as command
from rlrr_jax.projects.exits import predict

HYPER = {"lr": 0.02, "weight_decay": 0.0, "drop_path": 0.0, "num_devices": 1}
HYPER["model.unroll"] = 1  # which compiles faster
EXITS = {"loss": "exits", "loss_kwargs.at": (2, 4)}


def run(workdir, arg, **changes):
    config = vtab.get_config(f"hearts,{arg}")
    config.update_from_flattened_dict({"total_steps": 12, **HYPER, **changes})
    rows, problems = suite.run(config, workdir)
    assert not problems
    return rows


pytestmark = pytest.mark.slow  # runs of a minute; test_exit_heads.py and test_leave.py are fast


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """RLRR with exits, chosen on val200; and, each alone, without a choice, and of three blocks."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "exits", "method=rlrr", protocol="vtab", seeds=(0, 1), **EXITS)
    run(folder / "shallow", "method=rlrr", **{"model.depth": 3})
    return folder


def test_the_page_has_curves_knees_and_what_is_beside_them(runs, tmp_path, capsys):
    twice = [runs / "exits", runs / "exits/hearts", runs / "shallow"]
    with pictures.drawn():
        command.main([*map(str, twice), f"--out={tmp_path}"])
    shown = capsys.readouterr().out
    text = (tmp_path / "exits.md").read_text()
    assert text in shown and "## rlrr loss=exits at=2+4" in text and "| rlrr depth=3 |" in text
    found = {group["run"]: group for group in json.loads((tmp_path / "exits.json").read_text())}
    group = found["rlrr loss=exits at=2+4"]
    for seed in group["seeds"]:
        costs = [point["cost"] for point in seed["points"]]
        assert np.all(np.diff(costs) >= 0) and seed["alone"][-1] == pytest.approx(seed["test_acc"])
        assert costs[-1] == pytest.approx(group["costs"][-1])  # none leaves early
        assert seed["points"][-1]["accuracy"] == pytest.approx(seed["test_acc"])
        assert all(sum(point["shares"]) == pytest.approx(1) for point in seed["points"])
    assert len(group["seeds"]) == 2 and text.count("(knee)") == 1
    # Three of six blocks, and the patch embedding.
    assert found["rlrr depth=3"]["costs"][0] / group["costs"][-1] == pytest.approx(0.51, abs=0.02)
    with Image.open(tmp_path / "exits.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_what_has_no_curve_is_said(runs, tmp_path):
    for folders, message in (
        ([tmp_path], "there is no finished run in .*: give a --workdir"),
        ([runs / "shallow"], "no run in .* has early exits: train one with config.loss=exits"),
    ):
        with pytest.raises(UserError, match=message):
            command.main([*map(str, folders), f"--out={tmp_path / 'out'}"])
    path = runs / "exits/hearts/rlrr/seed0/adapter.safetensors"
    adapter = adapters.read(path)
    assert command.chooser(path, adapter).run.protocol == "tune"
    config = {
        **adapter.card["config"],
        "loss_kwargs": {**adapter.card["config"]["loss_kwargs"], "at": [1]},
    }
    other = adapter._replace(card={**adapter.card, "config": config})
    with pytest.raises(UserError, match="has no search beside it"):  # that is of other exits
        command.chooser(path, other)
    for change, message in (
        ({"accuracy": {"test_acc": None}}, "was never tested .config.protocol=tune.: leave it out"),
        ({"backbone_sha256": "a"}, "is a run with backbone_sha256=a, the first with .*: give"),
    ):
        with pytest.raises(UserError, match=message):
            command._check(path, {**adapter.card, **change}, adapter.card)
    swin = {**adapter.card, "model": "swin_t"}
    with pytest.raises(UserError, match="is a run of swin_t: only ViTs have exits, give runs of one"):
        command._check(path, swin, swin)
    with pytest.raises(UserError, match="was trained on the validation images, too, and has no search"):
        command.chooser(tmp_path / "rlrr" / "seed0" / "adapter.safetensors", adapter)


def test_predict_leaves_early_and_says_where(runs, tmp_path, monkeypatch, capsys):
    images, _ = store.load_split("hearts", "test", 32)
    for i in range(70):
        Image.fromarray(images[i][..., 0]).save(tmp_path / f"{i:02d}.png")
    adapter = runs / "exits/hearts/rlrr/seed0/adapter.safetensors"

    def classes(*flags):
        out = tmp_path / "out.csv"
        flags = [*map(str, flags), "--format=csv", f"--out={out}", "--batch_size=16"]
        command = predict.main if "--threshold" in flags[0] else plain.main
        argv = [f"--adapter={adapter}", str(tmp_path), *flags]
        monkeypatch.setattr(sys, "argv", ["predict", *argv])
        command()
        with open(out) as file:
            rows = list(csv.reader(file))[1:]
        return [float(row[2]) for row in rows], capsys.readouterr().err

    whole, said = classes()
    assert "left" not in said
    same, said = classes("--threshold=2")
    np.testing.assert_allclose(same, whole, rtol=1e-4)
    assert "left 0 at block 2, 0 at block 4, 70 at the end; 100 % of the FLOPs" in said
    first, said = classes("--threshold=0")
    assert "left 70 at block 2, 0 at block 4, 0 at the end; 35 % of the FLOPs" in said
    assert np.abs(np.array(first) - whole).max() > 0.01
    with pytest.raises(UserError, match="--threshold=-1.0 must be a number of at least 0"):
        classes("--threshold=-1")
    adapter = runs / "shallow/hearts/rlrr/seed0/adapter.safetensors"
    with pytest.raises(UserError, match="trained without early exits"):
        classes("--threshold=0.5")


def test_an_export_to_other_libraries_leaves_them_out_and_says_so(runs, tmp_path, monkeypatch, capsys):
    path = runs / "exits/hearts/rlrr/seed0"
    for to, name in (("big_vision", "a.npz"), ("timm", "a.safetensors"), ("adapter", "b.safetensors")):
        monkeypatch.setattr(sys, "argv", ["export", str(path), "--to", to, str(tmp_path / name)])
        export.main()
        said = "what config.loss=exits trained beside the head is left out" in capsys.readouterr().out
        assert said == (to != "adapter")
    again = adapters.read(tmp_path / "b.safetensors").trainable["loss"]
    mine = adapters.read(path / "adapter.safetensors").trainable["loss"]
    assert again.keys() == mine.keys() == {"scale", "shift", "kernel", "bias"}
    np.testing.assert_array_equal(again["kernel"], mine["kernel"])


def test_adapters_with_and_without_exits_are_combined(runs):
    """The head, and what exits it has, is that of the one that is named."""
    one = adapters.read(runs / "exits/hearts/rlrr/seed0/adapter.safetensors")
    card = {**one.card, "config": {**one.card["config"], "loss": "cross_entropy", "loss_kwargs": {}}}
    other = adapters.Adapter({k: one.trainable[k] for k in ("adapter", "head")}, card)
    for number, wanted in ((0, one), (1, other)):
        found = combine.combine([one, other], head=number)
        assert found.trainable.keys() == wanted.trainable.keys()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"loss": "exits"},
            "exits need config.loss_kwargs.at, numbers of blocks such as (3,6,9): set it",
        ),
        ({**EXITS, "loss_kwargs.at": (4, 2)}, "must be numbers of blocks from 1 to 5, in order"),
        ({**EXITS, "loss_kwargs.at": (2, 6)}, "must be numbers of blocks from 1 to 5, in order"),
        ({**EXITS, "loss_kwargs.at": (0,)}, "must be numbers of blocks from 1 to 5, in order"),
        ({**EXITS, "loss_kwargs.at": ("a",)}, "must be numbers of blocks from 1 to 5, in order"),
        ({**EXITS, "model.depth": 4}, "must be numbers of blocks from 1 to 3, in order"),
        ({**EXITS, "model.variant": "swin_t"}, "it needs blocks of one width, as a ViT has"),
        ({"model.depth": 6}, "config.model.depth=6 must be less than the 6 of bundled: leave it out"),
        ({"model.depth": 0}, "config.model.depth=0 must be greater than 0"),
        ({"model.variant": "swin_t", "model.depth": 2}, "config.model.depth is of no use for swin_t"),
        ({"arg": "hearts,method=met"}, "exits need config.loss_kwargs.at"),
    ],
    ids=str,
)
def test_wrong_exits_are_one_sentence(changes, message):
    config = vtab.get_config(changes.get("arg", "hearts,method=rlrr"))
    config.update_from_flattened_dict({k: v for k, v in changes.items() if k != "arg"})
    with pytest.raises(UserError) as error:
        config_lib.resolve(config)
    assert message in str(error.value)
