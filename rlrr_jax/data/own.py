"""Images of one's own as a task: a folder, a list of files, a dataset of Hugging Face or of tfds.

birds/train/<class>/*, birds/val/<class>/*, birds/test/<class>/*      splits as they are
birds/<class>/*                                                       split here, see `assign`
birds.csv or .tsv with the header path,label[,split]; or lines "path label"
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
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rlrr_jax import files, hub, lookup
from rlrr_jax.data import huggingface, sources, tasks
from rlrr_jax.data.examples import (
    ENDINGS,
    JUNK,
    SPLITS,
    UNREAD,
    Example,
    Files,
    check,
    copies,
    kinds,
    of_pixels,
    on_disk,
    passed_over,
    pictures,
    some,
)
from rlrr_jax.data.task import Found, Source, Split, Task
from rlrr_jax.errors import UserError

PARTS = ("train", "val", "train+val")  # to train on, to choose on, and to train on before the test
STEPS = 3500  # that a run of the default length has: 110 epochs of 1,000 images in batches of 32
LONGEST, SHORTEST = 110, 5  # epochs
LOOKED_AT = 500  # records of each part of a dataset of tfds
TFDS, HF = "tfds:", hub.PREFIX


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


class Images(NamedTuple):
    """Labelled images of one's own.

    Attributes:
      files: how their bytes are reached.
      classes: names of the classes, sorted.
      splits: "train", "val" and "test" -> examples.
      notes: sentences about what was passed over, made or found to be odd.
    """

    files: Files
    classes: tuple[str, ...]
    splits: dict[str, list[Example]]
    notes: list[str]


# Reading --------------------------------------------------------------------------------------


def read(location: str, options: Options) -> Images:
    """The labelled images of a folder or a list of files, divided into splits.

    Raises UserError if there are none, or for a line, label or file that cannot be used.
    """
    path = files.local(location.removeprefix(HF))
    notes: list[str] = []
    if location.startswith(HF) and hub.is_name(location.removeprefix(HF)) and not path.exists():
        path = _from_hub(location)
        notes.append(f"note: {location} is that of commit {path.name[:12]}")
    if location.startswith(HF) and path.is_dir():
        images, examples = huggingface.read(path)
    elif path.is_dir():
        images, (examples, notes) = on_disk(path), _read_folder(path)
    elif path.is_file() and not location.startswith(HF):
        images, (examples, notes) = on_disk(path.parent), _read_list(path)
    else:
        what = "dataset" if location.startswith(HF) else "folder or list of images"
        raise UserError(f"there is no {what} {path}: check config.own.path")
    if not examples:
        raise UserError(f"there is no image in {path}: name another")
    classes = tuple(sorted({e.label for e in examples}))
    if len(classes) < 2:
        raise UserError(
            f"all images of {path} have the class {classes[0]!r}: {_deeper(path, classes[0])}"
        )
    _check_names(path, classes)
    check(images, examples)
    splits, more = assign(examples, options)
    _check_splits(path, splits)
    notes += _alike(classes) + of_pixels(images, examples) + more + _oddities(images, classes, splits)
    return Images(images, classes, splits, notes)


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
        for other in _folders(path)
        for p in files.walk(other)
        if p.suffix.lower() in UNREAD
    )
    if unread:
        return (
            f"other classes have only files that are not read ({kinds(unread)}): convert them to JPEG"
        )
    inner = _innermost(inner)
    way = f"name {inner} if its folders are the classes"
    return way if len(_folders(inner)) > 1 else "add another class"


def _innermost(folder):
    """The folder below through which all others are reached, itself if it has several or none."""
    while len(_folders(folder)) == 1:
        (folder,) = _folders(folder)
    return folder


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


def _check_splits(path, splits):
    """UserError unless there are images to train and to test on, and some class has both."""
    both = splits["train"] + splits["val"]
    if not splits["train"] or not splits["test"]:
        lacking = "train" if not splits["train"] else "test"
        given = any(e.split for part in splits.values() for e in part)
        most = (
            2
            if given
            else max(collections.Counter(e.label for part in splits.values() for e in part).values())
        )
        way = "raise the fractions (config.own.test, config.own.val)"
        way = "a class needs two images and more" if most < 2 else f"add some, or {way}"
        raise UserError(f"{path} has no image to {lacking} on: {way}")
    if not {e.label for e in both} & {e.label for e in splits["test"]}:
        raise UserError(
            f"{path}: no class has both training and test images, so nothing learnt could be tested: "
            f"name the classes of both splits alike"
        )


_SPLIT_WORD = re.compile(r"(?i)(^|[^a-z])(training|train|testing|test|validation|valid|val)([^a-z]|$)")


def _check_layout(folder, inner):
    """UserError for folders whose names are those of splits with more around, such as training_set."""
    like = [p for p in inner if p.name.lower() not in SPLITS and _SPLIT_WORD.search(p.name)]
    if len(like) < 2:
        return
    below = [{q.name for q in _folders(_innermost(p))} for p in like]
    if below[0] and all(below) and len(set.intersection(*below)) > 1:
        names = " and ".join(p.name for p in like)
        raise UserError(
            f"{folder} has the folders {names}, which look like splits with the same classes in each: "
            f"rename them to train and test, or give one of them"
        )


def _read_folder(folder):
    """Examples and notes of an image folder; UserError if there is no image in a class folder."""
    found: list[Example] = []
    others: collections.Counter = collections.Counter()
    inner = _folders(folder)
    named = {p: SPLITS[p.name.lower()] for p in inner if p.name.lower() in SPLITS}
    _check_layout(folder, inner)
    # A folder of that name without folders in it is a class: vehicles are boats and trains.
    divided = any(split == "train" and _folders(p) for p, split in named.items())
    divided = divided or ("train" in named.values() and len(named) == len(inner))
    for top in named if divided else [folder]:
        paths, more = pictures(top)
        others += more
        for path in paths:
            parts = path.relative_to(top).parts
            if len(parts) < 2:
                others["in no class folder"] += 1
                continue
            name = unicodedata.normalize("NFC", parts[0])
            split = named[top] if divided else None
            found.append(Example(path.relative_to(folder).as_posix(), name, split))
    if not found:
        there = f" (there are others: {kinds(others)})" if others else ""
        where = folder / "train" if divided else folder
        raise UserError(f"there is no image in {where}/<class>/{there}: put some there")
    notes = _of_folders(folder, list(named) if divided else [folder], found)
    if divided and (left := [p.name for p in inner if p not in named]):
        notes.append(f"note: folders beside {folder}/train are passed over: {some(left)}")
    return found, notes + passed_over(folder, others)


def _folders(folder):
    """The folders in a folder, but for hidden ones and those of systems."""
    named = lambda p: not p.name.startswith(".") and p.name not in JUNK
    return [p for p in sorted(folder.iterdir()) if named(p) and p.is_dir()]


def _of_folders(folder, tops, found):
    """Notes on class folders without images, and on images that lie deeper."""
    paths = [pathlib.PurePath(e.path) for e in found]
    tops = [top.relative_to(folder) for top in tops]
    filled = {
        top / path.relative_to(top).parts[0] for path in paths for top in tops if top in path.parents
    }
    every = [p.relative_to(folder) for top in tops for p in _folders(folder / top)]
    notes = []
    if empty := [p.as_posix() for p in every if p not in filled]:
        notes.append(f"note: no image is in {some(empty)}")
    deeper = sorted({path.parent.as_posix() for path in paths if path.parent not in filled})
    if deeper:
        notes.append(f"note: images of {some(deeper)} have the class of the folder above")
    return notes


def _read_list(path):
    """Examples and notes of a list: CSV or TSV with a header, or bare lines."""
    if path.suffix.lower() in (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar"):
        raise UserError(f"{path} is an archive: unpack it, and give the folder")
    if path.suffix.lower() in (".parquet", ".arrow", ".json", ".jsonl", *ENDINGS):
        raise UserError(
            f"{path} is no list of images: give a folder, a .csv with columns path,label, or hf:FOLDER"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is no UTF-8 text ({e.reason}): save it as that") from e
    first = text.splitlines()[0] if text.strip() else ""
    tab = "\t" if "\t" in first else ";" if "," not in first else ","
    head = [name.strip().lower() for name in next(csv.reader([first], delimiter=tab), [])]
    lines = list(enumerate(text.splitlines(), 1))
    if {"path", "label"} <= set(head):
        if twice := [name for name, number in collections.Counter(head).items() if number > 1]:
            raise UserError(f"{path} has two columns {twice[0]!r}: remove or rename one")
        rows = _rows(path, text, tab)
        out = [_row(path, number, head, row) for number, row in rows if any(c.strip() for c in row)]
    elif path.suffix.lower() in (".csv", ".tsv"):
        raise UserError(f"{path} has the header {first!r}: name its columns path,label[,split]")
    else:
        out = [_bare(path, i, line) for i, line in lines if line.strip()]
    if not out:
        raise UserError(f"there is no image in {path}: add lines")
    labels: dict[str, Example] = {}
    for e in out:
        if (other := labels.setdefault(e.path, e)).label != e.label:
            raise UserError(
                f"{path}: {e.path} has the labels {other.label!r} and {e.label!r}: keep one"
            )
    notes = []
    if len(twice := set(out)) < len(out):
        notes.append(f"note: {len(out) - len(twice)} lines of {path} are there twice, and count once")
    return list(dict.fromkeys(out)), notes


def _rows(path, text, separator):
    """Numbers of lines and their cells, without the header; UserError for a quote left open."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    number, out = 0, []
    try:
        for row in rows:
            if any("\n" in cell or "\r" in cell for cell in row):
                raise csv.Error("a line break in a cell")
            out.append((rows.line_num, row))
            number = rows.line_num
    except csv.Error as e:
        raise UserError(
            f"{path}:{number + 1}: a quote opens here that is not closed on its line ({e}): close or "
            f"remove it"
        ) from e
    return out[1:]


def _row(path, number, head, row):
    """The example of a line with columns."""
    if len(row) != len(head):
        way = "quote what has a separator in it" if len(row) > len(head) else "add what is missing"
        raise UserError(f"{path}:{number}: {len(row)} columns instead of {len(head)}: {way}")
    values = {name: cell.strip() for name, cell in zip(head, row)}
    split = values.get("split") or None
    if split and split.lower() not in SPLITS:
        raise UserError(f"{path}:{number}: split {split!r} is none of train, val and test: correct it")
    if not values["path"] or not values["label"]:
        raise UserError(f"{path}:{number}: a path or label is empty: fill it in, or remove the line")
    label = unicodedata.normalize("NFC", values["label"])
    return Example(values["path"], label, split and SPLITS[split.lower()])


def _bare(path, number, line):
    """The example of a line `path label`; the label is what follows the last space."""
    match = re.fullmatch(r"\s*(.*\S)\s+(\S+)\s*", line)
    if not match:
        raise UserError(f"{path}:{number}: {line.strip()!r} is no path and label: correct that line")
    return Example(match[1], unicodedata.normalize("NFC", match[2]))


# Dividing -------------------------------------------------------------------------------------


def assign(examples: list[Example], options: Options) -> tuple[dict[str, list[Example]], list[str]]:
    """Divides images into "train", "val" and "test", and returns notes on what was done.

    Given splits stay. Where there is no test split, `val` is tested on, if that is given, else a
    fraction of each class; where nothing is left to choose on, a fraction of each class's training
    images. Within a class, images are ordered by SHA-256 of seed, class and path, so the division
    depends on nothing else: not on other classes, nor on the order of files.
    """
    given = {name: [e for e in examples if e.split == name] for name in ("val", "test")}
    rest, notes = [e for e in examples if e.split in (None, "train")], []
    if not given["test"] and given["val"]:
        given["test"], given["val"] = given["val"], []
        notes.append("note: there is no test split, so val is tested on")
    if not given["test"]:
        rest, given["test"] = _take(rest, options.test, options.seed)
        part = f"{options.test:g} of each class, and at least one of two"
        notes.append(f"note: {len(given['test'])} images are tested on: {part}")
    if options.shots is not None:
        rest = [e for group in _by_class(rest, options.seed) for e in group[: options.shots]]
        notes.append(f"note: {len(rest)} training images are kept, {options.shots} of a class at most")
    train, val = rest, given["val"]
    if not val:
        train, val = _take(rest, options.val, options.seed)
        notes.append(f"note: {len(val)} training images are chosen on, {options.val:g} of each class")
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


def _oddities(images, classes, splits):
    """Notes on imbalance, on classes without images in a split, and on images that are there twice."""
    train = splits["train"] + splits["val"]
    counts = collections.Counter(e.label for e in train)
    sizes = [counts[name] for name in classes]
    notes = [
        f"{len(train)} images to train on, {min(sizes)} to {max(sizes)} of each of {len(classes)} "
        f"classes; {len(splits['test'])} to test on"
    ]
    if max(sizes) > 5 * max(min(sizes), 1):
        rare = [f"{n} ({counts[n]})" for n in sorted(classes, key=lambda name: counts[name])]
        notes.append(f"note: classes are unequal; the rarest: {some(rare)}")
    if missing := [name for name in classes if not counts[name]]:
        notes.append(f"note: no training image has the class {some(missing)}: it cannot be learnt")
    if missing := sorted(set(classes) - {e.label for e in splits["test"]}):
        notes.append(f"note: no test image has the class {some(missing)}: it is not tested")
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
        return _tfds_task(name, location.removeprefix(TFDS), options, data_dir)
    images = read(location, options)
    sizes = {split: len(examples) for split, examples in images.splits.items()}
    both = sizes["train"] + sizes["val"]
    return Task(
        name=name,
        group="own",
        splits={**{s: s for s in ("train", "val", "test")}, "train+val": "train+val"},
        classes=len(images.classes),
        num_test=sizes["test"],
        sizes={"train": sizes["train"], "val": sizes["val"], "train+val": both},
        parts=PARTS,
        names=images.classes,
        rule="own, 1",
        epochs=epochs(both),
        schedule="cosine",
        flip=True,
        source=Source(_finder(images), _opener(images)),
        notes=tuple(images.notes),
        listing=listing(images),
    )


def _tfds_task(name, dataset, options, data_dir):
    """The task of a prepared tfds dataset with an image and a label: its own train and test split."""
    if options.shots is not None:
        raise UserError(
            f"config.own.shots is not for tfds:{dataset}, only for folders and lists: unset it"
        )
    found = _newest(dataset, data_dir)
    builder, _ = sources.open_tfds(found, "train", ())
    info = builder.info
    features = dict(info.features.items()) if hasattr(info.features, "items") else {}
    label = features.get("label")
    if not hasattr(label, "num_classes") or "image" not in features:
        raise UserError(f"{found.path} has no fields image and label: take a dataset of classification")
    test = next((part for part in ("test", "validation") if part in info.splits), None)
    if test is None or "train" not in info.splits:
        raise UserError(f"{found.path} has only {', '.join(info.splits)}: train and test are needed")
    number = info.splits["train"].num_examples
    kept = number - max(1, round(options.val * number))
    tested = info.splits[test].num_examples
    note = f"{number} images to train on, {label.num_classes} classes; {tested} to test on ({test}); "
    note += f"the last {number - kept} of train are chosen on"
    notes = (note, *_in_order(found, number, kept, label.num_classes))
    parts = {"train": f"train[:{kept}]", "val": f"train[{kept}:]", "train+val": "train", "test": test}
    return Task(
        name=name,
        group="own",
        splits=parts,
        classes=label.num_classes,
        num_test=tested,
        sizes={"train": kept, "val": number - kept, "train+val": number},
        parts=PARTS,
        tfds=dataset,
        epochs=epochs(number),
        schedule="cosine",
        flip=True,
        source=Source(lambda *_: found, sources.open_vtab),
        notes=notes,
    )


def _in_order(found, number, kept, classes):
    """Warnings for a training split whose parts have other classes, as one in order has."""
    _, fetch = sources.open_tfds(found, "train", ["label"])
    look = lambda first, stop: {
        int(e["label"])
        for i in np.unique(np.linspace(first, stop - 1, min(LOOKED_AT, stop - first)).astype(int))
        for e in fetch(int(i), int(i) + 1)
    }
    train, val = look(0, kept), look(kept, number)
    labels = train | val
    notes = []
    if len(val) < min(len(labels), number - kept) / 2:
        notes.append(
            f"warning: the images to choose on have {len(val)} of {len(labels)} classes, since "
            f"the dataset lies in the order of its classes: prepare it shuffled"
        )
    if number <= LOOKED_AT and (missing := sorted(val - train)):
        names = some(map(str, missing))
        notes.append(f"warning: {len(missing)} classes are chosen on and not trained: {names}")
    if number <= LOOKED_AT and len(labels) < classes:
        notes.append(f"note: {classes - len(labels)} of {classes} classes have no training image")
    return notes


def _newest(dataset, data_dir):
    """Where the newest prepared version of a tfds dataset is."""
    folder = epath.Path(data_dir or "~/tensorflow_datasets").expanduser() / dataset
    there = folder.iterdir() if folder.exists() else ()
    versions = [p for p in there if (p / "dataset_info.json").exists()]
    if not versions:
        raise UserError(
            f"there is no prepared tfds dataset {folder}: prepare it by tfds, or set config.data.dir"
        )
    newest = max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    return Found("tfds", newest, f"{dataset}:{newest.name}")


def epochs(number: int) -> int:
    """Epochs of about `STEPS` steps with batches of 32, from `SHORTEST` to `LONGEST`.

    Args:
      number: number of training images.
    """
    return min(LONGEST, max(SHORTEST, round(32 * STEPS / number)))


def listing(images: Images) -> str:
    """A CSV of every image with its split: what is written beside a run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("path", "label", "split"))
    writer.writerows((e.path, e.label, s) for s, part in images.splits.items() for e in part)
    return out.getvalue()


def _finder(images: Images) -> Callable:
    every = [e for part in images.splits.values() for e in part]
    lengths = [images.files.size(e) for e in every]
    digest = hashlib.sha256(f"{listing(images)}{lengths}".encode()).hexdigest()[:8]
    number = len(every)

    def find(task: Task, data_dir: Any, kind: str | None) -> Found:
        return Found("own", images.files.root, f"{task.name}, {number} images {digest}")

    return find


def _opener(images: Images) -> Callable:
    index, root = {name: i for i, name in enumerate(images.classes)}, images.files.root

    def open(task: Task, split: str, found: Found) -> Split:
        examples = [e for part in split.split("+") for e in images.splits[part]]
        labels = [index[e.label] for e in examples]

        def read(start: int, stop: int | None) -> list:
            these = zip(examples[start:stop], labels[start:stop])
            return [(images.files.read(e), (k,)) for e, k in these]

        digest = hashlib.sha256()
        for e, label in zip(examples, labels):
            digest.update(repr((str(root / e.path), label, images.files.stamp(e))).encode())
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
