"""How labelled images are divided into splits, and what is odd about them."""

import collections
import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rlrr_jax.data.examples import Example, Files, copies, some
from rlrr_jax.data.labels import names
from rlrr_jax.errors import UserError

PARTS = ("train", "val", "train+val")  # to train on, to choose on, and to train on before the test


class Options(NamedTuple):
    """How images without splits of their own are divided.

    Attributes:
      val: fraction of each class to choose on, where there is no split for it.
      test: fraction of each class to test on, where there is no split for it.
      shots: number of training images of each class that are kept; None keeps all.
      seed: seed of the division and of the shots.
    """

    val: float = 0.1
    test: float = 0.2
    shots: int | None = None
    seed: int = 0


def assign(
    examples: list[Example], options: Options, kind: str = "class"
) -> tuple[dict[str, list[Example]], list[str]]:
    """Divides images into "train", "val" and "test", and returns notes on what was done.

    Given splits stay. Where there is no test split, `val` is tested on, if that is given, else a
    fraction of each class; where nothing is left to choose on, a fraction of each class's training
    images. Within a class, images are ordered by SHA-256 of seed, class and path, so the division
    depends on nothing else: not on other classes, nor on the order of files. Images with values are of
    one class here; those with several labels are divided by `_evenly`.

    Args:
      examples: the images.
      options: how they are divided.
      kind: of their labels, see `metrics.KINDS`.
    """
    each = {"class": "each class", "labels": "each label", "value": "all"}[kind]
    if options.shots is not None and kind != "class":
        raise UserError("config.own.shots counts images of a class, and these have none: leave it out")
    take: Callable = {"class": _take, "labels": _evenly, "value": _of_all}[kind]
    given = {name: [e for e in examples if e.split == name] for name in ("val", "test")}
    rest, notes = [e for e in examples if e.split in (None, "train")], []
    if not given["test"] and given["val"]:
        given["test"], given["val"] = given["val"], []
        notes.append("note: there is no test split, so val is tested on")
    if not given["test"]:
        rest, given["test"] = take(rest, options.test, options.seed)
        part = f"{options.test:g} of {each}" + ", and at least one of two" * (kind == "class")
        notes.append(f"note: {len(given['test'])} images are tested on: {part}")
    if options.shots is not None:
        rest = [e for group in _by_class(rest, options.seed) for e in group[: options.shots]]
        notes.append(f"note: {len(rest)} training images are kept, {options.shots} of a class at most")
    train, val = rest, given["val"]
    if not val:
        train, val = take(rest, options.val, options.seed)
        notes.append(f"note: {len(val)} training images are chosen on, {options.val:g} of {each}")
    order = lambda part: sorted(part, key=lambda e: (e.label, e.path))
    return {"train": order(train), "val": order(val), "test": order(given["test"])}, notes


def _by_class(examples: Iterable[Example], seed: int) -> list[list[Example]]:
    """The examples of each class, in the order of the division."""
    groups = collections.defaultdict(list)
    for e in examples:
        groups[e.label].append(e)
    digest = lambda e: hashlib.sha256(f"{seed}\n{e.label}\n{e.path}".encode()).hexdigest()
    return [sorted(groups[label], key=digest) for label in sorted(groups)]


def _take(examples, fraction, seed):
    """What is left, and a fraction of each class: one at least of two images, all but one at most."""
    left, taken = [], []
    for group in _by_class(examples, seed):
        number = min(max(round(fraction * len(group)), int(fraction > 0)), len(group) - 1)
        taken += group[:number]
        left += group[number:]
    return left, taken


def _of_all(examples, fraction, seed):
    """What is left, and a fraction of all images, as `_take` does with one class."""
    left, taken = _take([e._replace(label="") for e in examples], fraction, seed)
    labels = {e.path: e.label for e in examples}
    return tuple([e._replace(label=labels[e.path]) for e in part] for part in (left, taken))


def _evenly(examples, fraction, seed):
    """What is left, and a fraction of the images, both with about the same share of each label.

    Iterative stratification (Sechidis et al., ECML 2011): the label with the fewest images that are not
    placed yet comes next; each of its images, in the order of SHA-256 of seed and path, goes where most
    of that label are wanted, then where most images are; ties stay.
    """
    digest = lambda e: hashlib.sha256(f"{seed}\n{e.path}".encode()).hexdigest()
    left_over, own = sorted(examples, key=digest), {e.label: names(e.label) for e in examples}
    totals = collections.Counter(name for e in examples for name in own[e.label])
    counts = +totals  # of what is not placed yet
    shares = (1 - fraction, fraction)
    wanted = [{name: share * n for name, n in totals.items()} for share in shares]
    room, parts = [share * len(examples) for share in shares], ([], [])

    def place(e, name):
        want = [(wanted[i].get(name, 0.0), room[i]) for i in (0, 1)]
        i = int(want[1] > want[0])
        parts[i].append(e)
        room[i] -= 1
        for mine in own[e.label]:
            wanted[i][mine] -= 1
            counts[mine] -= 1

    while counts := +counts:
        rarest = min(counts, key=lambda name: (counts[name], name))
        for e in [e for e in left_over if rarest in own[e.label]]:
            place(e, rarest)
        left_over = [e for e in left_over if rarest not in own[e.label]]
    for e in left_over:  # without labels
        place(e, "")
    return parts


def oddities(
    images: Files, classes: tuple[str, ...], splits: dict[str, list[Example]], kind: str = "class"
) -> list[str]:
    """Notes on imbalance, on classes without images in a split, and on images that are there twice."""
    train = splits["train"] + splits["val"]
    if kind == "value":
        values = [float(e.label) for e in train]
        said = f"values from {min(values):g} to {max(values):g}"
        notes = [f"{len(train)} images to train on, {said}; {len(splits['test'])} to test on"]
        for name in ("val", "test"):
            if len({e.label for e in splits[name]}) == 1:
                notes.append(f"warning: all {name} images have one value: R² says nothing of them")
        return notes + _twice(images, splits)
    own = names if kind == "labels" else lambda label: (label,)
    counts = collections.Counter(name for e in train for name in own(e.label))
    sizes, what = [counts[name] for name in classes], "labels" if kind == "labels" else "classes"
    notes = [
        f"{len(train)} images to train on, {min(sizes)} to {max(sizes)} of each of {len(classes)} "
        f"{what}; {len(splits['test'])} to test on"
    ]
    if max(sizes) > 5 * max(min(sizes), 1):
        rare = [f"{n} ({counts[n]})" for n in sorted(classes, key=lambda name: counts[name])]
        way = "" if kind == "labels" else ": --config.class_weights=balanced has them count alike"
        notes.append(f"note: {what} are unequal; the rarest: {some(rare)}{way}")
    one = "label" if kind == "labels" else "class"
    if missing := [name for name in classes if not counts[name]]:
        notes.append(f"note: no training image has the {one} {some(missing)}: it cannot be learnt")
    tested = {name for e in splits["test"] for name in own(e.label)}
    if missing := sorted(set(classes) - tested):
        notes.append(f"note: no test image has the {one} {some(missing)}: it is not tested")
    return notes + _twice(images, splits)


def _twice(images, splits):
    """Warnings of images with the same bytes in two splits, or of two classes."""
    placed = [(split, e) for split, part in splits.items() for e in part]
    groups = [[placed[i] for i in same] for same in copies(images, [e for _, e in placed])]
    notes = []
    for split, others, what in (
        ("test", {"train", "val"}, "test images"),
        ("val", {"train"}, "images to choose on"),
    ):
        both = [g for g in groups if others & {name for name, _ in g}]
        if same := [e.path for g in both for name, e in g if name == split]:
            number = f"{len(same)} of {len(splits[split])} {what}"
            notes.append(f"warning: {number} are in the training set, too: {some(same)}")
    if torn := [g for g in groups if len({e.label for _, e in g}) > 1]:
        shown = some([" and ".join(e.path for _, e in g) for g in torn])
        notes.append(f"warning: {len(torn)} images are there under several classes: {shown}")
    return notes
