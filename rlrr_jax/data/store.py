"""Splits as arrays: decoded and resized once with Pillow, then memory-mapped from a cache folder."""

import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from rlrr_jax import files
from rlrr_jax.data import cache, crops, sources, tasks
from rlrr_jax.data.decoding import Pixels, decode, pixels_of, readable, rgb
from rlrr_jax.data.examples import Unusable
from rlrr_jax.data.task import Found, Split, Task
from rlrr_jax.errors import UserError
from rlrr_jax.sides import Size, pair, text

_BLOCK = 256  # images that are decoded, written and checked together


class Images:
    """Images [N, side, side, 3] uint8 of an entry; a slice of them is read into memory.

    The file is mapped anew for each slice, so that what has been read no longer counts as ours.
    """

    def __init__(self, path):
        self.path = path
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape, self.dtype = mapped.shape, mapped.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[index])


class Entry(NamedTuple):
    """Where a split is, or is to be, in the cache.

    Attributes:
      folder: where the entry is.
      split: the `sources.Split` it is made of.
      side: size of the stored images in pixels, see `sides`.
      key: plain values; everything that shapes the images.
    """

    folder: Any
    split: sources.Split
    side: Size
    key: dict

    @property
    def bytes(self) -> int:
        """Size of the images."""
        return self.split.number * math.prod(pair(self.side)) * 3


def load_split(
    task: str | Task, split: str, pixels: Any, found: Found | None = None, cache_dir: str | None = None
) -> tuple:
    """Images and labels of a split, in the source's order.

    Args:
      task: a `Task`, or its name.
      split: one of the task's, such as "train800" or "test".
      pixels: a `Pixels`, or just the size. Small images of one size are kept as they are, and are to
        be resized on the device (`resize.bicubic`, bit-equal to Pillow).
      found: the `sources.Found`; None looks in the default places.
      cache_dir: folder of decoded images; None is ~/.cache/rlrr_jax.

    Returns:
      images [N, side, side, 3] uint8 (a NumPy array, or `Images` in a file) and labels [N] int32, or
      what `Task.encode` makes of them.

    Raises:
      UserError: if an image is damaged, a label is impossible or the disk is too small.
    """
    task, pixels = tasks.get(task), pixels_of(pixels)
    found = found or sources.find(task)
    if found.kind == "bundled":
        source = sources.open_split(task, split, found)
        small = not pixels.shorter and task.side <= min(pair(pixels.size))
        pixels = pixels._replace(size=task.side) if small else pixels
        images = [decode(i, pixels) for i, _ in source.read(0, None)]
        labels = np.array([label for _, (label,) in source.read(0, None)], np.int32)
        return np.stack(images), encoded(task, labels)
    entry = locate(task, split, pixels, found, cache_dir)
    if not intact(entry):  # one that is whole may lie on a read-only disk
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        (entry.folder.parent / cache.TAG).write_text(cache.TAG_TEXT)
        with files.lock(entry.folder.parent, f".{entry.folder.name}.lock", wait=True) as held:
            if not intact(entry):  # nobody made it while we waited
                try:
                    build(entry, task, split, held)
                except Unusable as e:
                    raise _with_others(e, task, split, found, pixels) from e
    labels = np.load(entry.folder / f"labels-{task.name}.npy", allow_pickle=False)
    _check_rule(entry, task, labels)
    return Images(entry.folder / "images.npy"), encoded(task, labels)


def encoded(task: Task, labels: np.ndarray) -> np.ndarray:
    """Labels as losses and metrics get them, see `Task.encode`."""
    return labels if task.encode is None else task.encode(labels)


def _with_others(error: Unusable, task: Task, split: str, found: Found, pixels: Pixels) -> Unusable:
    """What cannot be used of a user's images in the other splits, too: all are named at once."""
    bad, number = list(error.bad), error.number
    others = [s for s in ("train", "val", "test") if s in task.splits and s not in split.split("+")]
    for other in others if task.group == "own" else ():
        source = sources.open_split(task, other, found)
        number += source.number
        for start in range(0, source.number, _BLOCK):
            examples = source.read(start, min(start + _BLOCK, source.number))
            one = lambda item, source=source: _why(source, item[0], lambda: rgb(item[1][0], pixels))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                bad += [why for why in pool.map(one, enumerate(examples, start)) if why]
    return Unusable(found.path, number, bad)


def _why(split: Split, i: int, decode: Callable[[], Any]) -> tuple[str, str] | None:
    """Name of an image and why it cannot be decoded; None if it can."""
    try:
        with readable(split, i):
            decode()
    except UserError as e:
        return split.where(i), str(e.__cause__ or e)
    return None


def _named(name, task):
    """The task of a name that has the images of `task`."""
    return task if name == task.name else tasks.get(name)


def _check_rule(entry, task, labels):
    """UserError if a label function changed without the version in its rule."""
    number = min(64, len(labels))
    mine = entry.split.tasks.index(task.name)
    now = [values[mine] for _, values in entry.split.read(0, number)]
    if now != labels[:number].tolist():
        raise UserError(
            f"the stored labels of {task.name} are not what its label function gives now: raise the "
            f"version in its rule ({task.rule!r}), and they are made anew"
        )


def load_crops(
    task: str | Task, split: str, pixels: Pixels, crop: tuple, found: Found | None = None
) -> tuple:
    """The `crops.Crops` of a training split, decoded anew in each epoch, and its labels [N] int32.

    Args:
      crop: `(kind, seed)` of `crops.Crops`; the others as in `load_split`.
    """
    task = tasks.get(task)
    found = found or sources.find(task)
    source = sources.open_split(task, split, found)
    scale = task.scale if found.kind == "tfds" else 1
    mine = source.tasks.index(task.name)
    labels = []
    for start in range(0, source.number, _BLOCK):
        examples = source.read(start, min(start + _BLOCK, source.number))
        labels += [values[mine] for _, values in examples]
    labels = np.array(labels, np.int32)
    _check_labels(task, split, labels)

    def read(i):
        ((image, _),) = source.read(i, i + 1)
        with readable(source, i):
            return np.asarray(rgb(image, pixels, scale))

    kind, seed = crop
    return crops.Crops(read, source.number, kind, pixels, seed), encoded(task, labels)


def locate(
    task: str | Task,
    split: str,
    pixels: Pixels,
    found: Found | None = None,
    cache_dir: str | None = None,
) -> Entry:
    """The `Entry` of a split. Tasks that have the same images share it."""
    task = tasks.get(task)
    found = found or sources.find(task)
    source = sources.open_split(task, split, found)
    fits = not pixels.shorter and 0 < task.side <= min(pair(pixels.size))
    native = fits and _side(source) == task.side
    side = task.side if native else pixels.size
    key = {
        **source.key,
        **dict(side=side, native=native, scale=task.scale if found.kind == "tfds" else 1),
        **dict(variant="stored" if found.kind == "folder" else pixels.variant),
        **dict(format=cache.FORMAT, pillow=cache.PILLOW, split=split),
        **dict(tasks=list(source.tasks), labels=[_named(n, task).rule for n in source.tasks]),
        **(dict(shorter=pixels.shorter) if pixels.shorter else {}),
        **(dict(upright=True) if pixels.upright else {}),
        **(dict(white=True) if pixels.white else {}),
    }
    key = json.loads(json.dumps(key))
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
    stem = found.dataset.replace("/", "-").replace(":", "-")
    folder = cache.images_folder(cache_dir) / f"{stem}-{split}-{text(side)}px-{key['variant']}-{mark}"
    return Entry(folder, source, side, key)


def _side(source):
    """Side of the first image if it is a square, else None."""
    try:
        width, height = Image.open(io.BytesIO(source.read(0, 1)[0][0])).size
    except (OSError, ValueError, IndexError):  # reported when it is decoded
        return None
    return width if width == height else None


def missing_bytes(entries: list) -> int:
    """Bytes that entries will take that are not in the cache, each counted once."""
    new = {e.folder: e.bytes for e in entries if not (e.folder / "entry.json").exists()}
    return sum(new.values())


def intact(entry: Any) -> bool:
    """Whether an entry is there and every byte of it is what was written."""
    try:
        saved = files.read_json(entry.folder / "entry.json")
        if saved["key"] != entry.key:
            return False
        labels = [(entry.folder / f"labels-{t}.npy").read_bytes() for t in entry.split.tasks]
        images = Images(entry.folder / "images.npy")
        if images.shape != (entry.split.number, *pair(entry.side), 3):
            return False
        with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # a block of images each
            starts = range(0, len(images), _BLOCK)
            sums = list(pool.map(lambda i: zlib.crc32(images[i : i + _BLOCK]), starts))
        return saved["crc32"] == {"images": sums, "labels": [zlib.crc32(x) for x in labels]}
    except (OSError, ValueError, KeyError, EOFError):
        return False


def build(entry: Any, task: Task, split: str, alone: bool = True) -> None:
    """Decodes a split into its entry; the folder appears when it is complete.

    Args:
      alone: whether no other process can be doing the same, so that what a killed one left can go.
    """
    cache.check_space(entry.bytes, entry.folder.parents[1])
    part = entry.folder.with_name(f".{entry.folder.name}.{secrets.token_hex(4)}.part")
    mine = re.compile(re.escape(f".{entry.folder.name}.") + r"[0-9a-f]{8}\.part")
    for old in entry.folder.parent.iterdir() if alone else ():
        if mine.fullmatch(old.name):
            shutil.rmtree(old)
    part.mkdir()
    number, shape = entry.split.number, (entry.split.number, *pair(entry.side), 3)
    labels = np.empty((len(entry.split.tasks), number), np.int32)
    sums: list[int] = []
    bad: list[tuple[int, UserError]] = []
    with (
        (part / "images.npy").open("wb") as f,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(
            total=number, desc=f"decoding {task.name} {split}", unit="img", disable=number < 5000
        ) as bar,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(f, header)
        for start in range(0, number, _BLOCK):
            examples = _examples(entry, task, start, min(start + _BLOCK, number))
            put = functools.partial(_attempt, entry)
            decoded = list(pool.map(put, enumerate(examples, start)))
            failed = [(i, e) for i, e in enumerate(decoded, start) if isinstance(e, UserError)]
            bad += failed
            if bad:  # the others are looked at, so that all are named
                bar.update(len(decoded))
                continue
            block = np.stack(decoded)
            labels[:, start : start + len(block)] = np.array([k for _, k in examples], np.int32).T
            sums.append(zlib.crc32(block))
            f.write(block)
            bar.update(len(block))
        f.flush()
        os.fsync(f.fileno())
    if bad:
        shutil.rmtree(part)
        where = [(entry.split.where(i), str(e.__cause__ or e)) for i, e in bad]
        error = Unusable(entry.key.get("own", task.name), number, where)
        raise error if len(bad) > 1 or "own" in entry.key else bad[0][1]
    for name, values in zip(entry.split.tasks, labels):
        _check_labels(_named(name, task), split, values)
        np.save(part / f"labels-{name}.npy", values)
    label_sums = [zlib.crc32((part / f"labels-{t}.npy").read_bytes()) for t in entry.split.tasks]
    files.write_json(
        part / "entry.json", {"key": entry.key, "crc32": {"images": sums, "labels": label_sums}}
    )
    shutil.rmtree(entry.folder, ignore_errors=True)  # damaged, or another process was first
    part.rename(entry.folder)


def _examples(entry, task, start, stop):
    """What a source reads; UserError unless it is as many images with labels as it promised."""
    found = list(entry.split.read(start, stop))
    what = f"the source of {task.name}"
    if len(found) != stop - start:
        raise UserError(f"{what} reads {len(found)} images instead of {stop - start} from {start} on")
    for i, example in enumerate(found, start):
        good = isinstance(example, tuple | list) and len(example) == 2
        labels = example[1] if good else None
        if not isinstance(labels, tuple | list) or len(labels) != len(entry.split.tasks):
            number = len(entry.split.tasks)
            raise UserError(
                f"{what} must read (image, labels), labels a tuple of {number}, as "
                f"{entry.split.where(i)} is not"
            )
        if not all(isinstance(k, int | np.integer) and not isinstance(k, bool) for k in labels):
            raise UserError(
                f"{what} has the labels {labels} at {entry.split.where(i)}: give whole numbers"
            )
        if isinstance(example[0], np.ndarray) and example[0].dtype != np.uint8:
            kind, where = example[0].dtype, entry.split.where(i)
            raise UserError(f"{what} has pixels of {kind} at {where}: give uint8, 0 to 255")
    return found


_HOW = {"shorter": None, "upright": False, "white": False}  # keys of an entry, in the order of `Pixels`


def _attempt(entry, item):
    """An image, or the UserError of one that cannot be decoded."""
    (i, (image, _)), key = item, entry.key
    try:
        with readable(entry.split, i):
            if key["native"] and Image.open(io.BytesIO(image)).size != (entry.side,) * 2:
                raise OSError(f"its size is not {entry.side} x {entry.side}")
            how = (key.get(name, default) for name, default in _HOW.items())
            return decode(image, Pixels(entry.side, key["variant"], *how), key["scale"])
    except UserError as e:
        return e


def _check_labels(task, split, labels):
    if task.encode is not None:  # which knows them
        return
    classes = task.classes
    if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"labels of {task.name} {split} go from {labels.min()} to {labels.max()}, but the task has "
            f"{classes} classes: the dataset is not the expected one, prepare it again"
        )
