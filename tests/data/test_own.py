"""One's own images: six ways to the same data, the division, and wrong inputs."""

import csv
import io
import os
import pathlib
import re
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds
import vtab_data
from hub import in_place
from PIL import Image

from rlrr_jax import config as config_lib
from rlrr_jax import files, lookup, run_images, suite
from rlrr_jax.configs import own as own_config
from rlrr_jax.data import cache, decoding, own, sources, store
from rlrr_jax.errors import UserError

CLASSES = [f"class {i}" for i in range(5)]
PER_CLASS = {"train": 50, "test": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 pictures of 5 classes that differ in their colours, in train/ and test/."""
    root, rng = tmp_path_factory.mktemp("own") / "birds", np.random.default_rng(0)
    colours = rng.integers(0, 200, (len(CLASSES), 3))
    for split, number in PER_CLASS.items():
        for colour, name in zip(colours, CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                image = (colour + rng.integers(0, 56, (32, 32, 3))).astype(np.uint8)
                Image.fromarray(image).save(root / split / name / f"{i:03d}.png")
    return root


def task_of(location, **options):
    return own.task("birds", str(location), own.Options(**options))


def arrays(task, tmp_path, data_dir=None):
    """Images and labels of each split."""
    found = sources.find(task, data_dir)
    load = lambda split: store.load_split(task, split, decoding.Pixels(32), found, tmp_path)
    return {s: tuple(np.asarray(x[:]) for x in load(s)) for s in ("train", "val", "train+val", "test")}


def rows(folder):
    """`(path, class, split)` of every picture."""
    return [
        (path.relative_to(folder).as_posix(), path.parts[-2], path.parts[-3])
        for path in sorted(folder.rglob("*.png"))
    ]


def write_list(folder, path, rows, **dialect):
    with path.open("w", newline="") as f:
        csv.writer(f, **dialect).writerows(rows)
    return path


def write_tfds(task, root, folder):
    """The same pictures as a prepared dataset, in the order of the folder's task."""
    examples = iter(
        (image, labels[0])
        for split in ("train+val", "test")
        for image, labels in sources.open_split(task, split, sources.find(task)).read(0, None)
    )
    spec = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=CLASSES)}
    )

    def make(spec, rng):
        image, label = next(examples)
        return {"image": io.BytesIO(image), "label": label}

    numbers = {"train": 250, "test": 50}
    name = SimpleNamespace(tfds="birds", version="1.0.0")
    return vtab_data.write(root, name, numbers, "array_record", make, spec=spec)


def write_parquet(folder, target):
    """The same pictures as tables of parquet with their bytes inside."""
    kinds = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)}
    features = datasets.Features({**kinds, "note": datasets.Value("string")})
    for split in PER_CLASS:
        paths = [folder / path for path, _, of in rows(folder) if of == split]
        columns = {
            "picture": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
            "kind": [path.parts[-2] for path in paths],
            "note": [""] * len(paths),
        }
        (target / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(columns, features)
        table.to_parquet(target / "data" / f"{split}-00000-of-00001.parquet")
    return target


def test_folder_lists_tfds_and_hugging_face_give_the_same_images_and_the_same_result(folder, tmp_path):
    task = task_of(folder)
    table = write_list(folder, folder / "birds.csv", [("path", "label", "split"), *rows(folder)])
    tabs = [("label", "split", "path"), *((k, s, p) for p, k, s in rows(folder))]
    write_list(folder, folder / "birds.tsv", tabs, delimiter="\t")
    write_tfds(task, tmp_path / "tfds", folder)
    write_parquet(folder, tmp_path / "parquet" / "birds")
    first = arrays(task, tmp_path / "a")
    assert {s: len(x[1]) for s, x in first.items()} == {
        **{"train": 225, "val": 25, "train+val": 250, "test": 50}
    }
    results = []
    parquet = f"hf:{tmp_path}/parquet/birds"
    for location in (folder, table, folder / "birds.tsv", "tfds:birds", f"hf:{folder}", parquet):
        options = own.Options()
        other = own.task("birds", str(location), options, tmp_path / "tfds")
        assert (other.classes, other.epochs) == (5, 110) and list(other.names or CLASSES) == CLASSES
        found = arrays(other, tmp_path / "b")
        for split in first:
            for a, b in zip(first[split], found[split]):
                np.testing.assert_array_equal(a, b)
        config = own_config.get_config(f"{location},method=linear")
        config.task, config.model.variant, config.epochs, config.num_devices = "birds", "bundled", 2, 1
        config.image_size, config.data.dir = 32, str(tmp_path / "tfds")
        config.data.cache_dir = str(tmp_path / "c")
        workdir = tmp_path / f"w{len(results)}"
        (row,), problems = suite.run(config, workdir)
        assert not problems
        results.append((row["train_loss"], row["test_acc_final"]))
        assert row["test_acc_final"] > 0.5 and row["task"] == "birds"
        adapter = (workdir / "birds/linear/seed0/adapter.safetensors").read_bytes()
        assert b"class 4" in adapter
        if "tfds" not in str(location):
            assert (workdir / "birds/split.csv").read_text() == task.listing
    assert len(set(results)) == 1
    for name in ("birds.csv", "birds.tsv"):
        (folder / name).unlink()


# Dividing -------------------------------------------------------------------------------------


def flat(folder, target):
    """The training pictures without a split: one level of class folders."""
    shutil.copytree(folder / "train", target)
    return target


def splits(task):
    table = csv.DictReader(io.StringIO(task.listing))
    return {row["path"]: (row["label"], row["split"]) for row in table}


def test_the_division_is_stratified_fixed_and_depends_on_nothing_else(folder, tmp_path):
    task = task_of(flat(folder, tmp_path / "birds"))
    found = splits(task)
    for name in CLASSES:
        parts = [split for label, split in found.values() if label == name]
        assert {s: parts.count(s) for s in set(parts)} == {"train": 36, "val": 4, "test": 10}
    assert splits(task_of(tmp_path / "birds")) == found
    assert splits(task_of(tmp_path / "birds", seed=1)) != found
    shutil.rmtree(tmp_path / "birds/class 0")
    without = {path: x for path, x in found.items() if x[0] != "class 0"}
    assert splits(task_of(tmp_path / "birds")) == without
    # The rule, written down: SHA-256 of seed, class and path; the first fifth is tested on.
    import hashlib

    key = lambda path: hashlib.sha256(f"0\nclass 1\n{path}".encode()).hexdigest()
    order = sorted((p for p in without if without[p][0] == "class 1"), key=key)
    assert {p for p in order if without[p][1] == "test"} == set(order[:10])
    assert {p for p in order if without[p][1] == "val"} == set(order[10:14])


def test_a_validation_split_without_a_test_split_is_tested_on(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "birds/Train")
    shutil.copytree(folder / "test", tmp_path / "birds/valid")
    task = task_of(tmp_path / "birds")
    assert task.num_test == 50 and task.sizes == {"train": 225, "val": 25, "train+val": 250}
    assert "note: there is no test split, so val is tested on" in task.notes


def test_pruning_keeps_what_belongs_to_images_that_are_there(folder, tmp_path):
    arrays(task_of(folder), tmp_path / "cache")
    other = flat(folder, tmp_path / "birds")
    arrays(task_of(other), tmp_path / "cache")
    assert [why for _, _, why in cache.entries(tmp_path / "cache")] == [None] * 8
    shutil.rmtree(other)
    why = [why for _, _, why in cache.entries(tmp_path / "cache")]
    assert why.count(None) == 4 and why.count(f"its images {other} is not there") == 4
    assert cache.prune(tmp_path / "cache") == []  # it may be a disk that comes back


def test_shots_of_each_class_are_kept(folder, tmp_path):
    root = flat(folder, tmp_path / "birds")
    eight, four = (splits(task_of(root, shots=n, val=0.0)) for n in (8, 4))
    train = lambda found: {p for p, (_, split) in found.items() if split == "train"}
    assert (len(train(eight)), len(train(four))) == (40, 20) and train(four) < train(eight)
    test = lambda found: {p for p, (_, split) in found.items() if split == "test"}
    assert test(eight) == test(four) and len(test(four)) == 50


def test_imbalance_missing_classes_and_duplicates_are_said(folder, tmp_path):
    root = tmp_path / "birds"
    shutil.copytree(folder, root)
    for path in sorted((root / "train/class 3").iterdir())[4:]:
        path.unlink()
    shutil.rmtree(root / "train/class 4")
    shutil.copy(root / "train/class 0/000.png", root / "test/class 0/copy.png")
    text = "\n".join(task_of(root).notes)
    assert "154 images to train on, 0 to 50 of each of 5 classes; 51 to test on" in text
    assert "classes are unequal; the rarest: class 4 (0), class 3 (4), class 0 (50)" in text
    assert "no training image has the class class 4: it cannot be learnt" in text
    assert "warning: 1 of 51 test images are in the training set, too: test/class 0/copy.png" in text


def test_other_files_are_passed_over_with_a_note(folder, tmp_path):
    root = flat(folder, tmp_path / "birds")
    (root / "class 0/._000.png").write_bytes(b"x")
    (root / "class 0/Thumbs.db").write_bytes(b"x")
    (root / "README").write_text("x")
    shutil.move(root / "class 1/000.png", root / "loose.png")
    os.rename(root / "class 1/001.png", root / "class 1/001.PNG")  # upper case
    task = task_of(root)
    assert sum(task.sizes.values()) // 2 + task.num_test == 249
    (note,) = [n for n in task.notes if "passed over" in n]
    assert note.endswith("1 .db, 1 hidden, 1 in no class folder, 1 without an ending")


def test_names_of_classes_are_read_as_they_are(folder, tmp_path):
    names = ['a, b "c"', "Äpfel", "naïve café", "日本", "x y"]
    root = flat(folder, tmp_path / "birds")
    for old, new in zip(CLASSES, names):
        (root / old).rename(root / new)
    task = task_of(root)
    assert sorted(task.names) == sorted(names)
    table = write_list(root, root / "own.csv", [("path", "label"), *((p, k) for p, k, _ in rows(root))])
    assert splits(task_of(table)) == splits(task)  # through CSV with its quotes
    os.rename(root / "Äpfel", root / "A\u0308pfel")  # as macOS writes it
    assert task_of(root).names == task.names


def test_absolute_and_linked_paths_of_a_list(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    lines = [f"{folder}/{p} {k[-1]}" for p, k, _ in rows(folder)[:150]]
    lines += [f"link/{p} {k[-1]}" for p, k, _ in rows(folder)[150:]]
    (tmp_path / "birds.txt").write_text("\n".join(lines))
    task = task_of(tmp_path / "birds.txt")
    assert task.names == ("0", "1", "2", "3", "4") and task.num_test == 60
    assert arrays(task, tmp_path / "cache")["test"][0].shape == (60, 32, 32, 3)


def test_a_class_may_be_called_as_a_split(folder, tmp_path):
    root = flat(folder, tmp_path / "vehicles")
    for old, new in (("class 0", "train"), ("class 1", "test")):
        (root / old).rename(root / new)
    task = task_of(root)
    assert task.names == ("class 2", "class 3", "class 4", "test", "train")
    assert sum(task.sizes.values()) // 2 + task.num_test == 250


def test_empty_and_nested_folders_are_said(folder, tmp_path):
    root = flat(folder, tmp_path / "birds")
    (root / "empty").mkdir()
    (root / "class 0/nested").mkdir()
    (root / "class 0/000.png").rename(root / "class 0/nested/000.png")
    notes = task_of(root).notes
    assert "note: no image is in empty" in notes
    assert "note: images of class 0/nested have the class of the folder above" in notes


def test_images_under_two_classes_and_untested_classes_are_said(folder, tmp_path):
    root = tmp_path / "birds"
    shutil.copytree(folder, root)
    shutil.copytree(root / "test", root / "val")
    shutil.copy(root / "train/class 0/000.png", root / "val/class 1/copy.png")
    shutil.rmtree(root / "test/class 2")
    notes = task_of(root).notes
    assert "note: no test image has the class class 2: it is not tested" in notes
    both = "train/class 0/000.png and val/class 1/copy.png"
    assert f"warning: 1 images are there under several classes: {both}" in notes
    assert (
        "warning: 1 of 51 images to choose on are in the training set, too: val/class 1/copy.png"
    ) in notes
    assert any(
        n.startswith("warning: 40 of 40 test images are in the training set, too") for n in notes
    )


@pytest.mark.parametrize(("head", "mark"), [('"path","label"', ","), ("path;label", ";")])
def test_lists_as_other_programs_write_them(head, mark, folder):
    listed = "\n".join([head, *(f'"{p}"{mark}"{k}"' for p, k, _ in rows(folder))])
    (folder / "theirs.csv").write_text(listed)
    task = task_of(folder / "theirs.csv")
    (folder / "theirs.csv").unlink()
    assert task.names == tuple(CLASSES) and task.num_test == 60


def test_pictures_that_end_early_are_all_named(folder, tmp_path):
    root = flat(folder, tmp_path / "birds")
    for path in (root / "class 0").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    number = len(list((root / "class 0").iterdir()))
    message = rf"^{number} of {len(list(root.rglob('*.*')))} files of .*class 0/\d+.png .* and 45 more: remove or"
    with pytest.raises(UserError, match=message) as e:  # of every split at once
        arrays(task_of(root), tmp_path / "cache")
    assert len(e.value.bad) == number and not list((tmp_path / "cache").rglob("*.npy"))


def test_two_splits_that_share_a_file_are_said(folder, tmp_path):
    listed = [*rows(folder), ("train/class 0/000.png", "class 0", "test")]
    task = task_of(write_list(folder, folder / "twice.csv", [("path", "label", "split"), *listed]))
    (folder / "twice.csv").unlink()
    note = "warning: 1 of 51 test images are in the training set, too: train/class 0/000.png"
    assert note in task.notes


# Wrong inputs ---------------------------------------------------------------------------------


def lines(*text):
    """Writes a list beside two pictures of each of two classes."""
    return lambda root: (root / "own.csv").write_text("\n".join(text)) and root / "own.csv"


def bare(*text):
    return lambda root: (root / "own.txt").write_text("\n".join(text)) and root / "own.txt"


def spoil(name, data):
    def make(root):
        (root / name).write_bytes(data)
        return root

    return make


def only(name):
    def make(root):
        for path in root.iterdir():
            if path.name != name:
                shutil.rmtree(path)
        return root

    return make


def splits_alone(root):
    """Pictures in `train` and `test`, without folders of classes."""
    (root / "a").rename(root / "train")
    (root / "b").rename(root / "test")
    return root


def only_folder(root):
    """Puts the folder `data` beside a root into it."""
    root.mkdir()
    (root.parent / "data").rename(root / "data")
    return root


def raw(data):
    return lambda root: (root / "own.csv").write_bytes(data) and root / "own.csv"


def table(split="train", values=(0, 0, 1), image=None, **columns):
    """A dataset on disk of three images; `columns` are other features, or None for one too few."""

    def make(root):
        image_bytes = image or (root / "a/0.png").read_bytes()
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"]), **columns}
        cells = {"image": {"bytes": image_bytes, "path": None}, "other": None}
        features = datasets.Features({name: kind for name, kind in kinds.items() if kind})
        rows = {name: list(values) if name == "label" else [cells[name]] * 3 for name in features}
        part = datasets.Dataset.from_dict(rows, features)
        datasets.DatasetDict({split: part}).save_to_disk(root / "disk")
        return f"hf:{root}/disk"

    return make


def unreadable(root):
    """As for a user who may not read `b`; the tests may be root's, who may."""
    (root / "b/.unreadable").touch()
    return root


HEAD, A, B = "path,label", "a/0.png,a", "b/0.png,b"
WRONG = {
    "no such folder": (lambda root: root / "none", "there is no folder or list of images .*/none"),
    "empty folder": (
        lambda root: (root / "x").mkdir() or root / "x",
        "there is no image in .*/x/<class>/: put",
    ),
    "pictures in no class folder": (
        lambda root: root / "a",
        r"no image in .*/a/<class>/ \(there are others: 4 in no class folder\): put some there",
    ),
    "splits without classes": (
        splits_alone,
        r"no image in .*/own/train/<class>/ \(there are others: 8 in no class folder\): put some there",
    ),
    "one level too deep": (
        lambda root: root.rename(root.parent / "data") and only_folder(root),
        "have the class 'data': name .*/own/data if its folders are the classes",
    ),
    "a name of bytes": (
        lambda root: (
            (root / "a/0.png").rename(os.fsdecode(os.fsencode(root) + b"/a/caf\xe9.png")) and root
        ),
        r"1 of 8 files .* a/caf\\udce9.png \(its name is no UTF-8\)",
    ),
    "a list of nothing": (bare(" "), "there is no image in .*own.txt: add lines"),
    "one class": (only("a"), "all images of .* have the class 'a': add another class"),
    "no image": (spoil("a/2.png", b"text"), r"1 of 8 files .* cannot be used: a/2.png \(no image\)"),
    "empty file": (spoil("a/2.png", b""), r"a/2.png \(no image\)"),
    "two of them": (
        lambda root: spoil("b/7.png", b"x")(root) and spoil("b/8.png", b"x")(root),
        r"2 of 10 files .*b/7.png \(no image\), b/8.png \(no image\): remove or replace them",
    ),
    "a missing file": (lines(HEAD, A, "a/9.png,a", B), r"a/9.png \(not there\)"),
    "a folder as image": (lines(HEAD, A, "a,a", B), r"cannot be used: a \(Is a directory\)"),
    "no header": (lines(A, B), r"has the header 'a/0.png,a': name its columns path,label\[,split\]"),
    "other header": (lines("file,class", A, B), "has the header 'file,class'"),
    "too many columns": (lines(HEAD, "a/0.png,a,b", B), ":2: 3 columns instead of 2: quote what has"),
    "too few columns": (lines("path,label,split", A, B), ":2: 2 columns instead of 3: add"),
    "unknown split": (lines("path,label,split", f"{A},trian", B + ",test"), "split 'trian' is none of"),
    "empty label": (lines(HEAD, "a/0.png,", B), ":2: a path or label is empty"),
    "empty path": (lines(HEAD, ",a", B), ":2: a path or label is empty"),
    "two labels": (lines(HEAD, A, "a/0.png,b", B), "a/0.png has the labels 'a' and 'b': keep one"),
    "empty list": (lines(HEAD), "there is no image in .*own.csv"),
    "nothing": (raw(b"\n"), "has the header ''|there is no image"),
    "no UTF-8": (raw(b"path,label\n\xff\xfe,a\n"), "is no UTF-8 text .*: save it as that"),
    "bare word": (bare("a/0.png a", "b/0.png"), ":2: 'b/0.png' is no path and label"),
    "one class of a list": (bare("a/0.png a", "a/1.png a"), "have the class 'a': add another"),
    "train alone": (
        lines("path,label,split", f"{A},test", f"{B},test"),
        "has no image to train on: add some",
    ),
    "binary": (raw(b"\x00\x01\x02\n\x03"), "has the header"),
    "no folder of hf": (
        lambda root: f"hf:{root}/none",
        "there is no dataset .*/none: check config.own",
    ),
    "a file as hf": (lambda root: f"hf:{root}/a/0.png", "there is no dataset .*/a/0.png"),
    "empty folder of hf": (
        lambda root: (root / "x").mkdir() or f"hf:{root}/x",
        "library datasets cannot read .*/x .*: correct it",
    ),
    "damaged parquet": (
        lambda root: spoil("x.parquet", b"PAR1")(only("none")(root)) and f"hf:{root}",
        "library datasets cannot read .*: correct it",
    ),
    "two columns of images": (
        table(other=datasets.Image()),
        "one column of images, and has image, other",
    ),
    "no label": (table(label=None), "one column of classes, and has none among image"),
    "real numbers": (table(label=datasets.Value("float32")), "one column of classes, and has none"),
    "a label missing": (table(values=[-1, 0, 1]), "image 0 of train has no label: give it one"),
    "one class of hf": (table(values=[1, 1, 1]), "all images of .* have the class 'y': add another"),
    "a split of hf": (table(split="extra"), "has a split 'extra', none of train, val and test: rename"),
    "no image in hf": (table(image=b"text"), r"train/0 \(no image\), train/1 \(no image\)"),
    "a link to nothing": (
        lambda root: (root / "a/9.png").symlink_to(root / "none") or root,
        r"a/9.png \(not there\)",
    ),
    "an unreadable folder": (unreadable, "/own/b cannot be read .*: change its permissions"),
    "tfds not there": (lambda root: "tfds:none", "there is no prepared tfds dataset .*/none"),
}


def forbidden(scandir, folder):
    def scan(path):
        if os.fspath(path) == os.fspath(folder):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    return scan


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(case, tmp_path, monkeypatch):
    make, message = WRONG[case]
    root = tmp_path / "own"
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    location = make(root)
    if (root / "b/.unreadable").exists():
        monkeypatch.setattr(os, "scandir", forbidden(os.scandir, root / "b"))
    with pytest.raises(UserError, match=message) as e:
        own.task("own", str(location), own.Options(), tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("arg", "changes", "message"),
    [
        ("", {}, "name your images"),
        ("method=rlrr", {}, "name your images"),
        ("{folder},linear+lora", {}, "'linear\\+lora' is no option, such as method="),
        (
            "{folder},method=linear,cifar",
            {},
            "'cifar' is no option.* or give a folder whose name has a comma",
        ),
        ("./a=b", {}, "'./a=b' is no option"),
        ("{folder}", {"val": -0.1}, "config.own.val=-0.1 must be a fraction from 0 to 0.9"),
        ("{folder}", {"test": 1.0}, "config.own.test=1.0 must be a fraction"),
        ("{folder}", {"test": 0.0, "val": 0.0}, None),  # its test split is given
        (
            "{folder},method=linear",
            {"protocol": "tune", "val": 0.0},
            "needs images to choose on: raise",
        ),
        ("tfds:birds", {"shots": 4}, "config.own.shots is not for tfds:birds"),
        ("{folder}", {"shots": 0}, "config.own.shots=0 must be greater than 0"),
        ("{folder}", {"seed": -1}, "config.own.seed=-1 must be a whole number"),
        ("{folder},method=rlr", {}, "unknown method 'rlr': did you mean 'rlrr'"),
    ],
)
def test_wrong_configurations(arg, changes, message, folder):
    make = lambda: own_config.get_config(arg.format(folder=folder))
    if message is None:
        config = make()
        config.own.update(changes)
        (run,) = config_lib.resolve(config)
        assert run_images.splits(run) == ("train+val", "test")
        return
    with pytest.raises(UserError, match=message):
        config = make()
        config.protocol = changes.get("protocol")
        config.own.update({key: value for key, value in changes.items() if key != "protocol"})
        config_lib.resolve(config)


def test_names_and_folders():
    assert own.name("/data/birds/") == "birds" and own.name("x/birds.csv") == "birds"
    assert own.name("tfds:food101") == "food101" and own.name("/data/cifar") == "own_cifar"
    assert re.fullmatch(r"[\w.-]+", own.name("/data/my birds, 2"))
    here = pathlib.Path.cwd()
    assert own.name(".") == here.name and own.name("..") == here.parent.name
    assert own.absolute("hf:x/y/birds") == f"hf:{here}/x/y/birds" and own.absolute("tfds:a") == "tfds:a"


def test_a_dataset_of_the_hub(folder, tmp_path, monkeypatch):
    """The images of a repository, once somebody typed its name; a card's is not fetched."""
    from huggingface_hub import constants

    target = write_parquet(folder, tmp_path / "parquet" / "birds")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with in_place(monkeypatch) as hub:
        place = f"/datasets/me/birds/resolve/{'c' * 40}/"
        for path in target.rglob("*.*"):
            hub.files[place + path.relative_to(target).as_posix()] = path.read_bytes()
        hub.files[place + "birds.py"] = b"raise SystemExit"
        assert (
            own.absolute("hf:me/birds@main") == "hf:me/birds@main"
            and own.name("hf:me/birds@main") == "birds"
        )
        with pytest.raises(
            UserError, match="hf:me/birds are not on this machine: add --import hf:me/birds"
        ):
            task_of("hf:me/birds")
        assert not hub.asked
        lookup.allow("hf:me/birds")
        task = task_of("hf:me/birds")
        assert f"note: hf:me/birds is that of commit {'c' * 12}" in task.notes
        assert not [path for path in hub.asked if path.endswith(".py")]
        with pytest.raises(
            UserError, match="cannot get the dataset hf:me/none .* no folder here has that name"
        ):
            lookup.allow("hf:me/none")
            task_of("hf:me/none")
    for split, (images, labels) in arrays(task_of(folder), tmp_path / "a").items():
        found = arrays(task, tmp_path / "b")[split]
        np.testing.assert_array_equal(images, found[0])
        np.testing.assert_array_equal(labels, found[1])
    monkeypatch.setattr(lookup, "_ALLOWED", set())
    assert task_of("hf:me/birds").listing == task.listing  # as it lies in the library's cache
    (tmp_path / "me" / "birds").mkdir(parents=True)
    assert own.absolute("hf:me/birds") == f"hf:{tmp_path}/me/birds"  # a folder comes first


def test_other_images_in_the_same_workdir_are_refused(folder, tmp_path):
    root = flat(folder, tmp_path / "birds")
    config = own_config.get_config(f"{root},method=linear")
    config.model.variant, config.image_size, config.epochs, config.num_devices = "bundled", 32, 1, 1
    config.data.cache_dir = str(tmp_path / "cache")
    suite.run(config, tmp_path / "w")
    before = files.read_json(tmp_path / "w/birds/linear/seed0/result.json")
    assert before["dataset"].startswith("birds, 250 images ")
    (root / "class 0/000.png").unlink()
    run_images._own_task.cache_clear()
    message = r"holds a run with dataset=birds, 250 images .*\(now birds, 249"
    with pytest.raises(UserError, match=message):
        suite.run(config, tmp_path / "w")
