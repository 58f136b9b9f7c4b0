"""Preparing and checking: what is ready, what is missing, and how it was verified."""

import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import forked
import numpy as np
import pytest
import tensorflow_datasets as tfds
import vtab_data
from PIL import Image
from squeeze import squeeze

from rlrr_jax import prepare
from rlrr_jax.data import sources, tasks, vtab_check
from rlrr_jax.data import task as task_lib
from rlrr_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {"train": 24, "validation": 7, "test": 10}


@pytest.fixture
def small(monkeypatch):
    """Makes a task small: splits at other positions, sizes to match."""
    monkeypatch.setattr(task_lib, "SPLITS", {"train800": 8, "val200": 2, "train800val200": 10})

    def shrink(name):
        task = tasks.get(name)
        parts = {"train800": "train[:8]", "val200": "train[15:17]", "test": "test"}
        parts["train800val200"] = "train[:8]+train[15:17]"
        for other in [t.name for t in tasks.sharing(tasks.get(name), "test")]:
            changed = tasks.get(other)._replace(splits=parts, num_test=10, side=0)
            monkeypatch.setitem(tasks.TASKS, other, changed)
        monkeypatch.setitem(vtab_check.SIZES, task.tfds, {"train": 24, "test": 10})
        return tasks.get(name)

    return shrink


def numbered(field, key, order):
    """`make` for `vtab_data.write`: the field holds names in a given order."""
    names = iter(order)

    def make(spec, rng):
        return {**vtab_data.example(spec, rng), field: key(next(names))}

    return make


def by_md5(split, keys):
    """tfds's order, from the description of its hashing: md5 of the split's name, then the key."""
    return sorted(keys, key=lambda k: int(hashlib.md5(f"{split}{k}".encode()).hexdigest(), 16))


@pytest.mark.parametrize("stored_as", sources.FORMATS)
@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("dtd", "file_name", lambda k: k),
        ("kitti", "image/file_name", lambda k: k),
        ("cifar", "id", lambda k: f"train_{k:05d}"),
        ("svhn", "id", lambda k: f"test_{k:06d}"),
        ("clevr_dist", "file_name", lambda k: k),
    ],
)
def test_check_verifies_the_order_of_keys(name, field, value, stored_as, small, tmp_path):
    task = small(name)
    is_number = name in ("cifar", "svhn")
    keys = range(24) if is_number else [f"a/picture {i}.jpg" for i in range(24)]
    order = [*by_md5("train", keys), *by_md5("test", keys[:10])]
    for folder, wrong in (("right", False), ("wrong", True)):
        if wrong:
            order[4], order[5] = order[5], order[4]
        sizes = {"train": 24, "test": 10}
        make = numbered(field, value, order)
        vtab_data.write(tmp_path / folder, task, sizes, stored_as, make)
    text = vtab_check.check(name, tmp_path / "right")
    assert text == f"{task.tfds}:{task.version}, 8/2/10/10 images, labels in range, " + (
        "the md5 order of its keys"
    )
    with pytest.raises(UserError, match=r"example 5 of .* is not where its key puts it"):
        vtab_check.check(name, tmp_path / "wrong")


def test_a_version_without_stored_keys_is_checked_by_its_fingerprint(small, tmp_path, monkeypatch):
    task = small("svhn")
    spec = vtab_data.features(task)
    older = tfds.features.FeaturesDict({k: v for k, v in spec.items() if k != "id"})
    monkeypatch.setattr(vtab_data, "features", lambda task: older)
    vtab_data.write(tmp_path, task, {"train": 24, "test": 10}, "array_record")
    assert "recorded for the first time" in vtab_check.check("svhn", tmp_path)
    (tmp_path / vtab_check.FINGERPRINTS).write_text("{")
    with pytest.raises(UserError, match="fingerprints.json is damaged"):
        vtab_check.check("svhn", tmp_path)


def test_what_is_there_but_wrong_is_not_called_missing(tmp_path):
    vtab_data.write_folder(tmp_path, "resisc45", {"test": 3})
    out = command("--tasks", "resisc45", "--data_dir", tmp_path, "--check")
    assert "| resisc45 | wrong | see the line above |" in squeeze(out.stdout)


def test_the_hash_is_tfdss():
    from tensorflow_datasets.core import hashing

    for key in ("a/b.jpg", 1234):
        assert int(vtab_check.key_hash("train", key).hex(), 16) == hashing.Hasher("train").hash_key(key)


def test_check_names_wrong_sizes_and_labels(small, tmp_path, monkeypatch):
    task = small("dtd")
    vtab_data.write(tmp_path, task, {"train": 23, "test": 10}, "tfrecord")
    with pytest.raises(UserError, match="has 23 examples in train instead of 24"):
        vtab_check.check("dtd", tmp_path)
    monkeypatch.setitem(vtab_check.SIZES, "dtd", {"train": 23})
    monkeypatch.setitem(tasks.TASKS, "dtd", task._replace(classes=5))
    with pytest.raises(UserError, match="labels of dtd train800 go from .* instead of 0 to 4"):
        vtab_check.check("dtd", tmp_path)


def test_fingerprints_are_recorded_once_and_compared(small, tmp_path):
    task = small("smallnorb_ele")
    vtab_data.write(tmp_path, task, {"train": 24, "test": 10}, "array_record")
    assert "recorded for the first time" in vtab_check.check("smallnorb_ele", tmp_path)
    assert vtab_check.check("smallnorb_ele", tmp_path).endswith("as recorded")
    assert "recorded for the first time" in vtab_check.look("smallnorb_azi", tmp_path)
    shutil.rmtree(tmp_path / "smallnorb")
    vtab_data.write(tmp_path, task, {"train": 24, "test": 10}, "tfrecord")  # the same, stored otherwise
    assert vtab_check.check("smallnorb_ele", tmp_path).endswith("as recorded")
    shutil.rmtree(tmp_path / "smallnorb")
    vtab_data.write(tmp_path, task, {"train": 24, "test": 10}, "array_record", seed=1)
    with pytest.raises(UserError, match="fingerprint of smallnorb_ele .* and not .* as recorded in"):
        vtab_check.check("smallnorb_ele", tmp_path)


@pytest.mark.slow
def test_dsprites_labels_follow_from_the_factors():
    """The first labels were computed elsewhere, from the order of tfds and of the file."""
    for name, split, first in (
        ("dsprites_loc", "train800", [0, 0, 7, 6, 7, 11, 7, 5, 6, 14]),
        ("dsprites_ori", "train800", [6, 8, 0, 7, 9, 12, 14, 1, 14, 15]),
        ("dsprites_loc", "val200", [8, 13, 14, 12, 15, 9, 13, 8, 3, 1]),
    ):
        labels = vtab_check.dsprites_labels(name, split)
        assert labels[:10].tolist() == first and labels.min() == 0 and labels.max() == 15
    assert len(vtab_check.dsprites_labels("dsprites_loc", "test")) == 73728


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.slow
def test_a_dsprites_folder_is_checked_by_its_labels(right, tmp_path):
    """Of the real size; every line names the same image."""
    folder = tmp_path / "dsprites_ori"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "one.jpg")
    for split in ("train800", "val200", "train800val200", "test"):
        labels = vtab_check.dsprites_labels("dsprites_ori", split)
        if split == "test" and not right:
            labels[5] = (labels[5] + 1) % 16
        labels = np.random.default_rng(0).permutation(labels)  # the archive's own order
        (folder / f"{split}.txt").write_text("".join(f"one.jpg {k}\n" for k in labels))
    if right:
        text = vtab_check.check("dsprites_ori", tmp_path)
        assert text.endswith(
            "800/200/1000/73728 images, labels in range, labels computed from the factors"
        )
    else:
        with pytest.raises(
            UserError, match="labels of dsprites_ori test in .* are not those of dSprites"
        ):
            vtab_check.check("dsprites_ori", tmp_path)


def command(*args):
    return forked.run(["rlrr_jax.prepare", *args])


def test_check_ends_with_a_table_and_the_manual_steps(tmp_path):
    numbers = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 711}
    vtab_data.write_folder(tmp_path, "kitti", numbers, side=8)
    out = command("--tasks", "kitti,resisc45,sun397,caltech101", "--data_dir", tmp_path, "--check")
    assert out.returncode == 1 and "Traceback" not in out.stderr
    lines = out.stdout.splitlines()
    assert lines[0].startswith(
        "[1/4] kitti: ok: vtab-1k/kitti, 800/200/1000/711 images, labels in range, f"
    )
    assert lines[1].startswith("[2/4] resisc45: not ready: there is no prepared tfds dataset at")
    table = {line.split("|")[1].strip(): squeeze(line) for line in lines if line.startswith("| ")}
    assert "| ready |" in table["kitti"] and "| missing |" in table["sun397"]
    assert f"{tmp_path}/downloads/manual/NWPU-RESISC45/<class>/*.jpg" in table["resisc45"]
    assert "its address is dead" in table["sun397"] and "SUN397.tar.gz" in table["sun397"]
    last = out.stderr.strip().splitlines()[-1]
    assert last == "error: 3 of 4 tasks are not ready: resisc45, sun397, caltech101"


def test_unknown_and_bundled_tasks(tmp_path):
    out = command("--tasks", "resics45", "--check", "--data_dir", tmp_path)
    assert out.returncode == 1 and "unknown task 'resics45': did you mean 'resisc45'" in out.stderr
    out = command("--tasks", "digits", "--check")
    assert out.returncode == 1 and "digits is not part of VTAB-1k" in out.stderr


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="has TensorFlow")
def test_preparing_without_tensorflow_is_one_sentence(tmp_path):
    out = command("--tasks", "kitti", "--data_dir", tmp_path)
    assert out.returncode == 1 and out.stdout == ""
    assert out.stderr.startswith("error: preparing needs tensorflow") and "[prepare]" in out.stderr


def test_preparing_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """With a builder that fails in place of the second download."""
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: True)
    sizes = {"train": 800, "validation": 200, "test": 711}
    monkeypatch.setitem(vtab_check.SIZES, "kitti", sizes)

    def prepare_one(dataset, data_dir, manual):
        if dataset.startswith("resisc45"):
            raise AssertionError("You must download the dataset manually\nfrom somewhere")
        vtab_data.write(data_dir, tasks.get("kitti"), sizes, "array_record")
        return "prepared, 1 KiB"

    monkeypatch.setattr(prepare, "_prepare_one", prepare_one)
    monkeypatch.setattr(sys, "argv", ["x", "--tasks", "resisc45,kitti", "--data_dir", str(tmp_path)])
    with pytest.raises(UserError, match="1 of 2 tasks are not ready: resisc45"):
        prepare.main()
    out = capsys.readouterr().out
    assert (
        "[1/2] resisc45:3.0.0: failed: AssertionError: You must download the dataset manually\n" in out
    )
    assert "[2/2] kitti:3.3.0: prepared, 1 KiB" in out
    assert "[2/2] kitti: ok: kitti:3.3.0, 800/200/1000/711 images" in out


@pytest.mark.slow
def test_a_real_builder_with_tensorflow(tmp_path):
    """resisc45 from 31,500 images laid out by hand; tfds writes it, we read and check it."""
    pytest.importorskip("tensorflow")
    manual = tmp_path / "manual"
    names = tfds.builder("resisc45:3.0.0", data_dir="/nowhere").info.features["label"].names
    rng = np.random.default_rng(0)
    for name in names:
        folder = manual / "NWPU-RESISC45" / name
        folder.mkdir(parents=True)
        for i in range(700):
            image = np.full((256, 256, 3), rng.integers(0, 256, 3), np.uint8)
            Image.fromarray(image).save(folder / f"{name}_{i + 1:03d}.jpg")
    for stored_as in sources.FORMATS:
        data_dir = tmp_path / stored_as
        if stored_as == "tfrecord":
            builder = tfds.builder("resisc45:3.0.0", data_dir=data_dir, file_format="tfrecord")
            config = tfds.download.DownloadConfig(manual_dir=manual)
            builder.download_and_prepare(download_config=config)
        out = subprocess.run(
            [sys.executable, "-m", "rlrr_jax.prepare", "--tasks=resisc45", f"--data_dir={data_dir}"]
            + [f"--manual_dir={manual}"],
            cwd=ROOT,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr
        assert "[1/1] resisc45: ok: resisc45:3.0.0, 800/200/1000/6300 images" in out.stdout
        assert vtab_check.check("resisc45", data_dir).endswith("the md5 order of its keys")
    a, b = (
        sources.open_split("resisc45", "test", sources.find("resisc45", tmp_path / stored_as))
        for stored_as in sources.FORMATS
    )
    assert a.number == b.number == 6300 and a.read(0, 6300) == b.read(0, 6300)
