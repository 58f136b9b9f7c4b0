"""A fork's source that reads other than it promised: a sentence, and no memory of somebody else."""

import numpy as np
import pytest

from rlrr_jax.data import store
from rlrr_jax.data.task import Found, Source, Split, Task, splits
from rlrr_jax.errors import UserError


def task(change):
    """Eight pictures of two classes, read through `change(plain, start, stop)`."""

    def plain(start, stop):
        picture = lambda i: np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
        return [(picture(i), (i % 2,)) for i in range(8)[start:stop]]

    def open(task, split, found):
        read = lambda start, stop: change(plain, start, stop)
        return Split(8, ("mine",), read, {"folder": "mine"}, lambda i: f"picture {i}")

    numbers = {"train800": 8, "val200": 8, "train800val200": 8}
    source = Source(lambda *_: Found("mine", None, "mine"), open)
    names = splits("train", "val", "test")
    return Task(
        name="mine", group="own", source=source, splits=names, classes=2, num_test=8, sizes=numbers
    )


def each(change):
    return lambda plain, a, b: [change(image, labels) for image, labels in plain(a, b)]


WRONG = {
    "fewer": (lambda plain, a, b: plain(a, b)[:-3], "reads 5 images instead of 8 from 0 on"),
    "more": (lambda plain, a, b: plain(a, b) * 2, "reads 16 images instead of 8"),
    "a bare label": (each(lambda i, k: (i, k[0])), "must read .image, labels., labels a tuple of 1"),
    "no pair": (lambda plain, a, b: [i for i, _ in plain(a, b)], "must read .image, labels."),
    "a float label": (each(lambda i, k: (i, (0.5,))), "has the labels .0.5,. at picture 0"),
    "a text": (each(lambda i, k: (i, ("cat",))), "has the labels .'cat',. at picture 0"),
    "float pixels": (each(lambda i, k: (i / 255, k)), "has pixels of float64 at picture 0: give uint8"),
    "wide pixels": (each(lambda i, k: (i.astype(np.int32), k)), "has pixels of int32"),
}


@pytest.mark.parametrize("what", WRONG)
def test_sources(what, tmp_path):
    change, message = WRONG[what]
    mine = task(change)
    with pytest.raises(UserError, match=f"the source of mine {message}"):
        store.load_split(mine, "test", 8, mine.source.find(), str(tmp_path))
    assert not list(tmp_path.rglob("images.npy")) or not list(tmp_path.rglob("entry.json"))


def test_a_generator_is_read(tmp_path):
    mine = task(lambda plain, a, b: iter(plain(a, b)))
    images, labels = store.load_split(mine, "test", 8, mine.source.find(), str(tmp_path))
    assert images.shape == (8, 8, 8, 3) and labels.tolist() == [0, 1] * 4
