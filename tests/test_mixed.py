"""Several adapters of one backbone: each says what it sees, and batches whose images name theirs."""

import csv
import io
import json
import sys

import numpy as np
import pytest
from marks import quick
from PIL import Image

from rlrr_jax import adapters, mixed, predict
from rlrr_jax.errors import UserError


@pytest.fixture(scope="module")
def paths(tuned_runs):
    where = ("digits/rlrr", "hearts/rlrr", "digits/lora", "digits/ssf")
    return {name: tuned_runs / name / "seed0/adapter.safetensors" for name in where}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)


NAMES = ["digits/rlrr", "hearts/rlrr", "hearts/rlrr"] * 3


@pytest.mark.parametrize("merge", quick([True, False, None], True, False))
def test_each_image_is_answered_by_its_own_adapter(paths, images, merge):
    given = {name: paths[name] for name in set(NAMES)}
    found = adapters.predict_mixed(given, images, NAMES, merge=merge)
    for name, path in given.items():
        tuned = adapters.load(path)
        logits = np.float64(tuned.logits(images))
        wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for i in np.flatnonzero(np.array(NAMES) == name):
            assert found[i].shape == wanted[i].shape
            np.testing.assert_allclose(found[i], wanted[i], atol=2e-6)


@pytest.mark.slow
def test_adapters_of_any_method_are_merged_once(paths, images, monkeypatch):
    names = [*paths] * 2 + [*paths][:1]
    merged, load = [], adapters.load
    monkeypatch.setattr(adapters, "load", lambda a, on: merged.append(a) or load(a, on))
    found = adapters.predict_mixed(paths, images, names)
    assert len(merged) == 4 and [len(x) for x in found[:4]] == [10, 16, 10, 10]
    monkeypatch.undo()
    tuned = {name: adapters.load(path) for name, path in paths.items()}
    for one, other in zip(found, adapters.predict_mixed(tuned, images, names)):
        np.testing.assert_array_equal(one, other)


def test_wrong_batches_are_one_sentence(paths, images):
    rlrr = {"digits": paths["digits/rlrr"]}
    other = adapters.read(paths["hearts/rlrr"])
    other = other._replace(card={**other.card, "backbone_sha256": "0" * 64})
    small = adapters.read(paths["hearts/rlrr"])
    small = small._replace(
        card={**small.card, "config": {**small.card["config"], "precision": "default"}}
    )
    tuned = adapters.load(paths["digits/rlrr"])
    for given, names, options, message in (
        (rlrr, ["digit"] * 9, {}, "unknown adapter 'digit': did you mean 'digits'"),
        (rlrr, ["digits"], {}, "1 names are given for 9 images: give one of each"),
        ({**rlrr, "b": other}, ["digits", "b"] * 4 + ["b"], {}, "digits and b are of other backbones"),
        ({**rlrr, "b": small}, ["digits", "b"] * 4 + ["b"], {}, "digits and b take other images"),
        (
            {"a": paths["digits/lora"]},
            ["a"] * 9,
            {"merge": False},
            "the adapter a is no plain RLRR of rank 1 of a ViT that is not merged yet",
        ),
        ({"a": tuned}, ["a"] * 9, {"merge": False}, "the adapter a is no plain RLRR"),
        ({"a": "nothing.safetensors"}, ["a"] * 9, {}, "there is no adapter nothing.safetensors"),
    ):
        with pytest.raises(UserError, match=message) as e:
            adapters.predict_mixed(given, images, names, **options)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="images must be uint8"):
        adapters.predict_mixed(rlrr, np.float32(images), ["digits"] * 9)
    with pytest.raises(UserError, match="images of 64 x 64 are larger than the 32 x 32"):
        adapters.predict_mixed(rlrr, np.zeros((1, 64, 64, 3), np.uint8), ["digits"])
    on = adapters.backbone(paths["digits/rlrr"])._replace(sha256="0" * 64)
    with pytest.raises(UserError, match="the backbone is not that of the adapter digits"):
        adapters.predict_mixed(rlrr, images, ["digits"] * 9, on=on, merge=False)
    assert adapters.predict_mixed({}, images[:0], []) == []


def test_changed_activations_want_plain_rlrr():
    said = adapters.Adapter(
        {}, {"method": "rlrr", "method_kwargs": {"rank": 2}, "config": {"model": {}}}
    )
    assert not mixed._plain(said)


# The command ----------------------------------------------------------------------------------


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, words)])
    predict.main()
    return capsys.readouterr().out


@pytest.fixture
def files(images, tmp_path):
    for i, image in enumerate(images[:3]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return sorted(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_several_adapters_read_each_image_once(paths, files, monkeypatch, capsys):
    chosen = [paths["digits/rlrr"], paths["hearts/rlrr"]]
    alone = [
        run(monkeypatch, capsys, "--adapter", path, "--format", "jsonl", *files) for path in chosen
    ]
    read, backbones = [], []
    one, load = predict.read, adapters.backbone
    monkeypatch.setattr(predict, "read", lambda path, pixels: read.append(path) or one(path, pixels))
    monkeypatch.setattr(adapters, "backbone", lambda *a, **k: backbones.append(a) or load(*a, **k))
    text = run(monkeypatch, capsys, "--format", "jsonl", "--adapter", *chosen, *files)
    assert sorted(read) == files and len(backbones) == 1
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["adapter"] for row in rows] == ["digits", "hearts"] * 3
    for i, name in enumerate(("digits", "hearts")):
        mine = [
            {k: x for k, x in row.items() if k != "adapter"} for row in rows if row["adapter"] == name
        ]
        assert mine == [json.loads(line) for line in alone[i].splitlines()]
    text = run(monkeypatch, capsys, "--adapter", *chosen, *files)
    assert [line.split()[0] for line in text.splitlines()] == ["digits", "hearts"] * 3
    assert [line.split()[1] for line in text.splitlines()] == [str(f) for f in files for _ in range(2)]


def test_adapters_of_one_task_are_called_as_they_were_named(paths, files, monkeypatch, capsys):
    chosen = [paths["digits/rlrr"], paths["digits/lora"].parent]
    text = run(monkeypatch, capsys, "--adapter", *chosen, *files, "--format", "csv", "--top_k", 2)
    head, *rows = csv.reader(io.StringIO(text))
    assert head == ["file", "adapter", "class1", "p1", "class2", "p2"]
    assert [row[1] for row in rows] == [str(path) for path in chosen] * 3
    for adapter in chosen:  # and each says what it does alone
        text = run(monkeypatch, capsys, "--adapter", adapter, *files, "--format", "csv", "--top_k", 2)
        _, *alone = csv.reader(io.StringIO(text))
        assert alone == [[row[0], *row[2:]] for row in rows if row[1] == str(adapter)]


def test_images_may_stand_before_the_adapters(paths, files, monkeypatch, capsys):
    text = run(monkeypatch, capsys, *files, "--adapter", paths["digits/rlrr"])
    assert len(text.splitlines()) == 3
    with pytest.raises(UserError, match="no images are named: give files, folders or patterns"):
        run(monkeypatch, capsys, "--adapter", paths["digits/rlrr"], paths["hearts/rlrr"])
    with pytest.raises(UserError, match="there is no adapter .*none: give an adapter.safetensors"):
        run(monkeypatch, capsys, "--adapter", files[0].parent / "none", *files)
