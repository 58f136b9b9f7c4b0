"""Features in a file: what the head gets, with paths, labels and splits."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

from rlrr_jax import adapters, cards, features, models
from rlrr_jax.configs import own as own_config
from rlrr_jax.configs import vtab
from rlrr_jax.data import decoding, own
from rlrr_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    rows = [("path", "labels"), *((f"{i}.png", ["a;b", "b", ""][i % 3]) for i in range(30))]
    with (root / "list.csv").open("w", newline="") as f:
        csv.writer(f).writerows(rows)
    return root


def config_of(folder):
    config = own_config.get_config(f"{folder}/list.csv")
    config.model.variant, config.model.depth = "bundled", 2  # as the runs
    return config


def test_features_are_what_the_head_gets(folder, tuned_runs):
    found = features.table(config_of(folder))
    assert found["features"].shape == (30, 96) and found["features"].dtype == np.float32
    adapter = adapters.read(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")
    frozen, model = adapters.backbone(adapter).frozen, cards.model(adapter).clone(num_classes=1)
    for i in (0, 7, 29):
        number = int(found["path"][i].rpartition("/")[2][:-4])
        image = decoding.decode((folder / f"{number}.png").read_bytes(), 32)
        pixels = image[None] / np.float32(127.5) - 1
        (wanted,) = models.head_inputs(model, frozen, pixels)
        np.testing.assert_allclose(found["features"][i], wanted, rtol=1e-4, atol=1e-4)
        assert found["label"][i] == ["a;b", "b", ""][number % 3]
    assert sorted(found["split"]) == sorted(["train"] * 22 + ["val"] * 2 + ["test"] * 6)
    task = own.task("list", f"{folder}/list.csv", own.Options())
    split = {row["path"]: row["split"] for row in csv.DictReader(task.listing.splitlines())}
    assert all(split[p.rpartition("/")[2]] == s for p, s in zip(found["path"], found["split"]))


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_the_command_writes_them(ending, folder, tmp_path, capsys):
    out = tmp_path / f"out.{ending}"
    features.save(config_of(folder), str(out))
    assert f"{out}: 30 images of 96 values" in capsys.readouterr().out
    if ending == "npz":
        found = dict(np.load(out, allow_pickle=False))
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(out)
        found = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    assert found.keys() == {"features", "path", "label", "split"}
    assert found["features"].shape == (30, 96) and set(found["label"]) == {"a;b", "b", ""}


def test_wrong_commands_are_one_sentence(folder, tmp_path, monkeypatch):
    mine, out = config_of(folder), str(tmp_path / "x.npz")
    (tmp_path / "folder.npz").mkdir()
    nowhere, rlr = own_config.get_config("/nowhere"), config_of(folder)
    rlr.pretrained.name = "B/17"
    for config, name, message in (
        (mine, str(tmp_path / "x.csv"), "written as .npz or .parquet: .*x.csv ends in neither"),
        (mine, str(tmp_path / "no/x.npz"), "there is no folder .*no for x.npz: make it"),
        (mine, str(tmp_path / "folder.npz"), "folder.npz"),
        (mine, None, "a configuration and a file are needed: add --out FILE.npz"),
        (None, out, "are needed: add --config configs/own.py:FOLDER"),
        (vtab.get_config(), out, r"these are several tasks \(hearts, digits\): name one"),
        (vtab.get_config("cifer"), out, "unknown task 'cifer': did you mean 'cifar'"),
        (nowhere, out, "there is no folder or list of images /nowhere"),
        (rlr, out, "B/17"),
    ):
        with pytest.raises(UserError, match=message) as e:
            features.save(config, name)
        assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=".parquet needs pyarrow: install the extra hf, or write .npz"):
        features.save(mine, str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match="'more' belongs to no flag: see --help"):
        features.main(["features", "more"])


@pytest.mark.slow
def test_a_task_of_ours(tmp_path):
    found = features.table(vtab.get_config("digits"))
    assert len(found["features"]) == 1797 and set(found["label"]) == {str(i) for i in range(10)}
