"""What a task is, as a value that travels from the configuration to the images."""

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from rlrr_jax.data import folds

SPLITS = {"train800": 800, "val200": 200, "train800val200": 1000}  # of VTAB-1k, and "test"


def field(name: str) -> Callable[[dict], Any]:
    """The label function that takes a field as it is."""
    return lambda example: example[name]


class Found(NamedTuple):
    """Where the examples of a task are.

    Attributes:
      kind: "bundled", "tfds", "folder", or a name of a fork's own source.
      path: where the dataset is, with its version.
      dataset: what it is, for tables: "cifar100:3.0.2".
    """

    kind: str
    path: Any
    dataset: str


class Split(NamedTuple):
    """The examples of a split.

    Attributes:
      number: number of examples.
      tasks: names of the tasks whose labels are known.
      read: function `(start, stop) -> [(image, labels)]`; an image is encoded bytes or an array
        [H, W] or [H, W, 3] of uint8, labels go with `tasks`.
      key: plain values that tell these images from all others.
      where: function `i -> text` that names an example to the user.
    """

    number: int
    tasks: tuple
    read: Callable
    key: dict
    where: Callable


class Source(NamedTuple):
    """Where the images of a task come from.

    Attributes:
      find: function `(task, data_dir, kind) -> Found`; UserError if they are not there.
      open: function `(task, split, found) -> Split`.
      names: function `(task, found) -> names of classes`, where the images know them; or None.
    """

    find: Callable
    open: Callable
    names: Callable | None = None


class Task(NamedTuple):
    """One classification task.

    Attributes:
      name: how it is called in configurations and results.
      group: "natural", "specialized", "structured", "bundled", "full", "own" or a project's.
      splits: our split names -> tfds's instructions (bundled: parts of the file).
      classes: number of classes.
      num_test: number of test images.
      tfds: tfds's name of the dataset, with its configuration.
      version: the one that can still be prepared; another of `majors` is read if it is there.
      majors: major versions with the same images.
      image: field of the image.
      label: pure function from an example to the class.
      rule: name and version of what `label` computes. Raise the version when you change it: labels
        are stored with the decoded images.
      fields: names of the example's fields that `label` reads.
      side: side of the square images in pixels, if all have the same small size, else 0.
      scale: what stored pixel values are multiplied by.
      flip: whether the recipe flips training images.
      epochs: the recipe's.
      schedule: see `optim.learning_rates`.
      recipes: dict by method of what replaces the method's DEFAULTS (and the task's epochs).
      extra: other keys of the recipe, for all methods, such as `crop`.
      sizes: number of images in each split but "test"; None is `SPLITS`.
      parts: names of the splits to train on, to choose on, and to train on before the test.
      names: names of the classes, where the dataset does not name them.
      source: where its images come from; None is a tfds dataset or a VTAB-1k folder, or bundled.
      kind: of its labels, see `metrics.KINDS`.
      encode: function from labels as the source gives them, whole numbers [N], to what losses and
        metrics get; None gives these numbers. Several labels are 0 and 1 [N, classes] float32; values
        [N] float32 are in units of their deviation.
      unit: deviation and mean of values.
      notes: sentences about its images, which are printed.
      listing: a table of its images and their splits, which is written beside its runs; "" is none.
    """

    name: str
    group: str
    splits: Mapping
    classes: int
    num_test: int
    tfds: str = ""
    version: str = ""
    majors: tuple = ()
    image: str = "image"
    label: Callable = field("label")
    rule: str = "label, 1"
    fields: tuple = ("label",)
    side: int = 0
    scale: int = 1
    flip: bool = False
    epochs: int = 110
    schedule: str = "official"
    recipes: Mapping = MappingProxyType({})
    extra: Mapping = MappingProxyType({})
    sizes: Mapping | None = None
    parts: tuple = tuple(SPLITS)
    names: tuple = ()
    source: Source | None = None
    kind: str = "class"
    encode: Callable | None = None
    unit: tuple[float, float] = (1.0, 0.0)
    notes: tuple = ()
    listing: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.num_test, self.listing))

    def number(self, split: str) -> int:
        """Number of images in a split, or in a fold of it, see `folds`."""
        if fold := folds.parse(split):
            return fold.size(self.number(fold.whole))
        return self.num_test if split == "test" else (self.sizes or SPLITS)[split]


def splits(train: str, val: str, test: str) -> dict[str, str]:
    """VTAB-1k's splits from tfds's instructions for training, validation and test images."""
    return {"train800": train, "val200": val, "train800val200": f"{train}+{val}", "test": test}


STEPS = 3500  # that a run of the default length has: 110 epochs of 1,000 images in batches of 32
LONGEST, SHORTEST = 110, 5  # epochs


def epochs_for(number: int) -> int:
    """Epochs of about `STEPS` steps with batches of 32, from `SHORTEST` to `LONGEST`.

    Args:
      number: number of training images.
    """
    return min(LONGEST, max(SHORTEST, round(32 * STEPS / number)))


def stamp(path: Any) -> list:
    """Size and time of a file: another file has another stamp."""
    if "://" in str(path):
        stat = path.stat()
        return [stat.length, stat.mtime]
    stat = os.stat(path)  # epath's asks for the owner's name, too, which there may be none of
    return [stat.st_size, int(stat.st_mtime)]
