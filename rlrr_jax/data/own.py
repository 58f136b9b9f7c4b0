"""Images of one's own as a task: a folder, a list of files, a dataset of Hugging Face or of tfds.

birds/train/<class>/*, birds/val/<class>/*, birds/test/<class>/*      splits as they are
birds/<class>/*                                                       split here, see `assign`
birds.csv or .tsv with the header path,label[,split]; or lines "path label"
birds.csv with path,labels (a;b), or a column of 0 and 1 for each label, or path,value
hf:/data/birds, hf:user/birds, hf:user/birds@revision                 a dataset of Hugging Face
tfds:food101                                                          its own train and test split
"""

import collections
import csv
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from rlrr_jax import files, hub, lookup
from rlrr_jax.data import huggingface, labels, listed, own_tfds, tasks
from rlrr_jax.data.division import PARTS, Options, assign, oddities
from rlrr_jax.data.examples import UNREAD, Example, Files, check, kinds, of_pixels, on_disk, some
from rlrr_jax.data.task import Found, Source, Split, Task, epochs_for
from rlrr_jax.errors import UserError

TFDS, HF = "tfds:", hub.PREFIX


class Images(NamedTuple):
    """Labelled images of one's own.

    Attributes:
      files: how their bytes are reached.
      classes: names of the classes, or labels, sorted.
      kind: of the labels, see `metrics.KINDS`.
      splits: "train", "val" and "test" -> examples.
      notes: sentences about what was passed over, made or found to be odd.
    """

    files: Files
    classes: tuple[str, ...]
    kind: str
    splits: dict[str, list[Example]]
    notes: list[str]


# Reading --------------------------------------------------------------------------------------


def read(location: str, options: Options) -> Images:
    """The labelled images of a folder or a list of files, divided into splits.

    Raises UserError if there are none, or for a line, label or file that cannot be used.
    """
    path, kind = files.local(location.removeprefix(HF)), "class"
    notes: list[str] = []
    if location.startswith(HF) and hub.is_name(location.removeprefix(HF)) and not path.exists():
        path = _from_hub(location)
        notes.append(f"note: {location} is that of commit {path.name[:12]}")
    if location.startswith(HF) and path.is_dir():
        images, examples, kind = huggingface.read(path)
    elif path.is_dir():
        images, (examples, notes) = on_disk(path), listed.read_folder(path)
    elif path.is_file() and not location.startswith(HF):
        images, (examples, kind, notes) = on_disk(path.parent), listed.read_list(path)
    else:
        what = "dataset" if location.startswith(HF) else "folder or list of images"
        raise UserError(f"there is no {what} {path}: check config.own.path")
    if not examples:
        raise UserError(f"there is no image in {path}: name another")
    classes = _names(examples, kind)
    if len(classes) < 2 and kind == "class":
        raise UserError(
            f"all images of {path} have the class {classes[0]!r}: {_deeper(path, classes[0])}"
        )
    if not classes and kind == "labels":
        raise UserError(f"no image of {path} has a label: give some")
    _check_names(path, classes)
    check(images, examples)
    splits, more = assign(examples, options, kind)
    _check_splits(path, splits, kind)
    notes += _alike(classes) + of_pixels(images, examples) + more
    notes += oddities(images, classes, splits, kind)
    return Images(images, classes, kind, splits, notes)


def _names(examples, kind):
    """Names of the classes of examples, sorted, or of their labels; values have none."""
    own = {"class": lambda label: (label,), "labels": labels.names, "value": lambda label: ()}[kind]
    return tuple(sorted({name for e in examples for name in own(e.label)}))


def _from_hub(location):
    """The folder of a dataset of the Hub; it is downloaded if a user typed its name, no card did."""
    try:
        return hub.dataset(location.removeprefix(HF), fetch=lookup.is_allowed(location))
    except hub.NotFetched as e:
        raise UserError(f"{e}: add --import {location} to download them") from e


def _deeper(path, name):
    """What to do where all images have one class: their folders may lie deeper."""
    inner = path / name if path.is_dir() else None
    if inner is None or not inner.is_dir():
        return "add another class"
    unread = collections.Counter(
        p.suffix.lower()
        for other in listed.folders(path)
        for p in files.walk(other)
        if p.suffix.lower() in UNREAD
    )
    if unread:
        return (
            f"other classes have only files that are not read ({kinds(unread)}): convert them to JPEG"
        )
    inner = listed.innermost(inner)
    way = f"name {inner} if its folders are the classes"
    return way if len(listed.folders(inner)) > 1 else "add another class"


def _check_names(path, classes):
    """UserError for names of classes that break lines."""
    for name in classes:
        if len(name.splitlines()) > 1 or "\0" in name:
            raise UserError(
                f"{path} has a class with a line break in it, {name[:40]!r}: close its quotes"
            )


def _alike(classes):
    """Warnings for classes whose names differ in case alone."""
    named: dict[str, list[str]] = {}
    for name in classes:
        named.setdefault(name.casefold(), []).append(name)
    twice = [" and ".join(map(repr, names)) for names in named.values() if len(names) > 1]
    return [f"warning: classes that differ in case alone are several: {some(twice)}"] if twice else []


def _check_splits(path, splits, kind):
    """UserError unless there are images to train and to test on, and some class has both."""
    both = splits["train"] + splits["val"]
    if not splits["train"] or not splits["test"]:
        lacking = "train" if not splits["train"] else "test"
        every = [e for part in splits.values() for e in part]
        alone = max(collections.Counter(e.label for e in every).values()) < 2
        way = "add some, or raise the fractions (config.own.test, config.own.val)"
        if alone and not any(e.split for e in every):
            way = "a class needs two images and more"
        raise UserError(f"{path} has no image to {lacking} on: {way}")
    names = {*_names(both, kind)} & {*_names(splits["test"], kind)}
    if kind != "value" and not names:
        raise UserError(
            f"{path}: no class has both training and test images, so nothing learnt could be tested: "
            f"name the classes of both splits alike"
        )


# A task ---------------------------------------------------------------------------------------


def task(name: str, location: str, options: Options, data_dir: Any = None) -> Task:
    """The task of one's own images.

    Args:
      name: how it is called in results.
      location: folder or list of files.
      options: how images are divided.
      data_dir: folder of tfds datasets.

    Raises UserError for images that cannot be used, see `read`.
    """
    if location.startswith(TFDS):
        return own_tfds.task(name, location.removeprefix(TFDS), options, data_dir)
    images = read(location, options)
    sizes = {split: len(examples) for split, examples in images.splits.items()}
    both = sizes["train"] + sizes["val"]
    every, trained = (
        [e.label for s in of for e in images.splits[s]] for of in (images.splits, PARTS[:2])
    )
    coded = labels.coded(images.kind, every, trained, location)
    return Task(
        name=name,
        group="own",
        splits={**{s: s for s in ("train", "val", "test")}, "train+val": "train+val"},
        classes=len(coded.names),
        num_test=sizes["test"],
        sizes={"train": sizes["train"], "val": sizes["val"], "train+val": both},
        parts=PARTS,
        names=coded.names,
        rule="own, 1",
        kind=images.kind,
        encode=coded.encode,
        unit=coded.unit,
        epochs=epochs_for(both),
        schedule="cosine",
        flip=True,
        source=Source(_finder(images), _opener(images, coded.codes)),
        notes=tuple(images.notes),
        listing=listing(images),
    )


def listing(images: Images) -> str:
    """A CSV of every image with its split: what is written beside a run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("path", {"class": "label"}.get(images.kind, images.kind), "split"))
    writer.writerows((e.path, e.label, s) for s, part in images.splits.items() for e in part)
    return out.getvalue()


def _finder(images: Images) -> Callable:
    every = [e for part in images.splits.values() for e in part]
    lengths = [images.files.size(e) for e in every]
    digest = hashlib.sha256(f"{listing(images)}{lengths}".encode()).hexdigest()[:8]
    return lambda task, *_: Found(
        "own", images.files.root, f"{task.name}, {len(every)} images {digest}"
    )


def _opener(images: Images, codes: dict[str, int]) -> Callable:
    root = images.files.root

    def open(task: Task, split: str, found: Found) -> Split:
        examples = [e for part in split.split("+") for e in images.splits[part]]
        numbers = [codes[e.label] for e in examples]

        def read(start: int, stop: int | None) -> list:
            these = zip(examples[start:stop], numbers[start:stop])
            return [(images.files.read(e), (k,)) for e, k in these]

        digest = hashlib.sha256()
        for e, number in zip(examples, numbers):
            digest.update(repr((str(root / e.path), number, images.files.stamp(e))).encode())
        key = {"own": str(root.absolute()), "list": digest.hexdigest()}
        return Split(len(examples), (task.name,), read, key, lambda i: str(root / examples[i].path))

    return open


def absolute(location: str) -> str:
    """A location that is the same from every folder."""
    if location.startswith(TFDS):
        return location
    inner = location.removeprefix(HF)
    if location.startswith(HF) and hub.is_name(inner) and not files.local(inner).exists():
        return location  # of the Hub
    prefix = HF if location.startswith(HF) else ""
    return f"{prefix}{files.local(location.removeprefix(HF)).absolute()}"


def name(location: str) -> str:
    """A name for results from a location: `"/data/birds/"` -> `"birds"`, `"."` -> the folder's."""
    path = pathlib.PurePath(absolute(location).rpartition(":")[2].partition("@")[0])
    path = pathlib.Path(os.path.realpath(path)) if path.name == ".." else path
    stem = path.stem if path.suffix in (".csv", ".tsv", ".txt") else path.name
    plain = re.sub(r"[^\w.-]+", "_", stem).lstrip(".")[:80] or "own"
    return f"own_{plain}" if plain in tasks.TASKS or plain in tasks.ALIASES else plain
