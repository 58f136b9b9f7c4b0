"""Lists with several labels an image, and with values; how they are divided."""

import collections
import io
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds
import vtab_data
from PIL import Image

from rlrr_jax.data import decoding, division, labels, own, sources, store
from rlrr_jax.data.examples import Example
from rlrr_jax.errors import UserError

SEVERAL = ["red;big", "red", "", "big;green", "green", "red;green;big"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 pictures of 8 pixels."""
    root = tmp_path_factory.mktemp("labels")
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    return root


def write(root, name, head, cells):
    path = root / name
    path.write_text("\n".join([head, *(f"{i}.png,{cell}" for i, cell in enumerate(cells))]))
    return path


def task(path, **options):
    return own.task("own", str(path), own.Options(**options))


def all_labels(task, tmp_path):
    """Path -> what losses get, of all images."""
    found, out = sources.find(task), {}
    for split in ("train", "val", "test"):
        _, values = store.load_split(task, split, decoding.Pixels(8), found, tmp_path)
        where = sources.open_split(task, split, found).where
        out |= {int(where(i).rpartition("/")[2][:-4]): x for i, x in enumerate(values)}
    return out


def test_columns_and_semicolons_say_the_same(folder, tmp_path):
    several = [SEVERAL[i % 6] for i in range(60)]
    names = ["big", "green", "red"]
    hot = [",".join(str(int(n in s.split(";"))) for n in names) for s in several]
    made = [
        task(write(folder, "semicolons.csv", "path,labels", several)),
        task(write(folder, "columns.csv", "path," + ",".join(names), hot)),
    ]
    for one in made:
        assert one.names == ("big", "green", "red") and one.classes == 3 and one.kind == "labels"
    first, second = (all_labels(one, tmp_path) for one in made)
    assert len(first) == 60
    for i, text in enumerate(several):
        wanted = [float(n in text.split(";")) for n in names]
        assert list(first[i]) == list(second[i]) == wanted and first[i].dtype == np.float32
    assert made[0].listing == made[1].listing and made[0].listing.startswith("path,labels,split")
    assert "note: images have several labels; 30 of 60 have one or none" in made[0].notes


def test_a_label_with_a_semicolon_is_several(folder):
    cells = ["red;big", *["red"] * 59]
    found = task(write(folder, "some.csv", "path,label", cells))
    assert found.kind == "labels" and found.names == ("big", "red")


def test_values_are_in_their_deviation(folder, tmp_path):
    values = [3.5 * i - 10 for i in range(60)]
    made = task(write(folder, "value.csv", "path,value", values))
    assert (made.kind, made.classes, made.names) == ("value", 1, ("value",))
    deviation, mean = made.unit
    found = all_labels(made, tmp_path)
    for i, value in enumerate(values):
        assert found[i] * deviation + mean == pytest.approx(value, abs=1e-4)
    _, trained = store.load_split(made, "train+val", decoding.Pixels(8), sources.find(made), tmp_path)
    assert trained.mean() == pytest.approx(0, abs=1e-6) and trained.std() == pytest.approx(1)


def test_a_sequence_of_classes_of_hugging_face(folder):
    names = ["big", "green", "red"]
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    for feature, values in (
        (datasets.ClassLabel(names=names), [[2, 0], [], [1]]),
        (datasets.Value("string"), [["red", "big"], [], ["green"]]),
    ):
        rows = {"image": [{"bytes": out.getvalue(), "path": None}] * 30, "labels": values * 10}
        kinds = {"image": datasets.Image(), "labels": datasets.Sequence(feature)}
        root = folder / type(feature).__name__
        root.mkdir()
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        made.to_parquet(root / "t.parquet")
        found = task(f"hf:{root}")
        assert found.kind == "labels" and found.names == ("big", "green", "red")
        assert {line.split(",")[1] for line in found.listing.splitlines()[1:]} == {
            "big;red",
            "",
            "green",
        }


def test_a_sequence_of_classes_of_tfds(tmp_path):
    names, several = ["big", "green", "red"], [[2, 0], [], [1]]
    spec = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=names)),
        }
    )
    numbers, count, png = {"train": 12, "test": 6}, iter(range(18)), io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")

    def make(spec, rng):
        return {"image": io.BytesIO(png.getvalue()), "labels": several[next(count) % 3]}

    where = SimpleNamespace(tfds="many", version="1.0.0")
    vtab_data.write(tmp_path, where, numbers, "array_record", make, spec=spec)
    made = own.task("many", "tfds:many", own.Options(), tmp_path)
    assert made.kind == "labels" and made.names == tuple(names) and made.classes == 3
    found = sources.find(made, tmp_path)
    _, got = store.load_split(made, "test", decoding.Pixels(8), found, tmp_path / "cache")
    np.testing.assert_array_equal(got, np.tile([[1, 0, 1], [0, 0, 0], [0, 1, 0]], (2, 1)))


# Division -------------------------------------------------------------------------------------


def test_shares_of_labels_are_kept():
    """Of labels from 4 to 300 images each part gets its share to within one; random draws do not."""
    random = np.random.default_rng(0)
    rates = [0.3, 0.1, 0.02, 0.5, 0.007]
    hot = random.random((600, 5)) < rates
    text = [labels.joined(f"l{i}" for i in np.flatnonzero(row)) for row in hot]
    examples = [Example(f"{i}.png", label) for i, label in enumerate(text)]
    splits, notes = division.assign(examples, division.Options(), "labels")
    assert sorted(e for part in splits.values() for e in part) == sorted(examples)
    assert len(splits["test"]) == pytest.approx(120, abs=1)
    for i in range(5):
        count = lambda part, i=i: sum(f"l{i}" in labels.names(e.label) for e in part)
        assert count(splits["test"]) == pytest.approx(0.2 * hot[:, i].sum(), abs=1.01)
    assert notes[0] == f"note: {len(splits['test'])} images are tested on: 0.2 of each label"
    again, _ = division.assign(examples[::-1], division.Options(), "labels")
    assert again == splits  # it does not depend on the order of files
    other, _ = division.assign(examples, division.Options(seed=1), "labels")
    assert other["test"] != splits["test"]


def test_values_are_divided_as_one_class():
    examples = [Example(f"{i}.png", repr(float(i))) for i in range(50)]
    splits, _ = division.assign(examples, division.Options(), "value")
    assert collections.Counter({k: len(v) for k, v in splits.items()}) == dict(test=10, train=36, val=4)
    assert sorted(e for part in splits.values() for e in part) == sorted(examples)


# Wrong lists ----------------------------------------------------------------------------------

WRONG = {
    "a name with a semicolon": ("path,a;b,c", ["0,1"], "own.csv has a label called 'a;b': give it a"),
    "no name": ("path,,c", ["0,1"], "own.csv has a label called '': give it a name without ;"),
    "large": ("path,value", ["1e38", "-1e38"] * 9, "own.csv are too large for float32: give them in"),
    "far": ("path,value", ["1700000000", "1700000001"] * 9, "around 1.7e\\+09, too little for float32"),
    "neither 0 nor 1": (
        "path,red,big",
        ["0,1", "2,0"],
        "own.csv:3: column 'red' has '2', neither 0 nor 1: correct it, or name the column of labels",
    ),
    "no labels": (
        "path,split",
        ["train"],
        "own.csv has no column of labels: name one label, labels or",
    ),
    "no number": ("path,value", ["1.5", "x"], "own.csv:3: the value 'x' is no number: correct it"),
    "not finite": ("path,value", ["1.5", "inf"], "own.csv:3: the value 'inf' is not finite"),
    "empty value": ("path,value", ["1.5", ""], "own.csv:3: a path or value is empty: fill it in"),
    "one value": ("path,value", ["1.5"] * 20, "all training images of .*own.csv have one value: add"),
    "all empty": ("path,labels", [""] * 20, "no image of .*own.csv has a label: give"),
    "empty class": (
        "path,label",
        ["a", ""],
        "own.csv:3: a path or label is empty.*call the column labels, if an image may have none",
    ),
    "two answers": (
        "path,label",
        ["a", "b\n0.png,c"],
        "0.png has the labels 'a' and 'c': keep one, or write both in one line as a;b",
    ),
    "a column more": ("path,red,big", ["0,1,1"], "own.csv:2: 4 columns instead of 3: quote what has"),
    "split": ("path,labels,split", ["a;b,dev2"], "split 'dev2' is none of train, val and test"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lists_are_one_sentence(case, folder):
    head, cells, message = WRONG[case]
    path = write(folder, "own.csv", head, cells)
    with pytest.raises(UserError, match=message) as e:
        task(path)
    assert "\n" not in str(e.value)


def test_shots_are_of_classes(folder):
    with pytest.raises(
        UserError, match="config.own.shots counts images of a class, and these have none"
    ):
        task(write(folder, "value.csv", "path,value", range(60)), shots=4)
