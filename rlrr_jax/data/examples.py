"""Labelled images of one's own as values, and how their bytes are reached."""

import collections
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from rlrr_jax import files
from rlrr_jax.data.task import stamp
from rlrr_jax.errors import UserError

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".tga"),
)
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"dev": "val", "test": "test", "testing": "test"}
SHOWN = 5  # files or classes in a message
_AT_ONCE = 10_000  # images that wait for a thread


class Example(NamedTuple):
    """A labelled image.

    Attributes:
      path: path below the folder or beside the list, or an absolute one; the key of the division.
      label: name of its class.
      split: "train", "val", "test", or None where nothing says it.
    """

    path: str
    label: str
    split: str | None = None


class Files(NamedTuple):
    """How the bytes of examples are reached.

    Attributes:
      root: folder that paths start from.
      open: function of an example that opens its encoded image for reading.
      size: function of an example, its bytes.
      stamp: function of an example; plain values that change with it.
    """

    root: pathlib.Path
    open: Callable[[Example], BinaryIO]
    size: Callable[[Example], int]
    stamp: Callable[[Example], list]

    def read(self, example: Example) -> bytes:
        """The encoded image."""
        with self.open(example) as file:
            return file.read()


def pictures(folder: pathlib.Path) -> tuple[list[pathlib.Path], collections.Counter]:
    """Image files below a folder by their endings, and the number of other files of each kind."""
    found, others = [], collections.Counter[str]()
    for path in files.walk(folder):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            others["hidden"] += 1
        elif path.suffix.lower() in ENDINGS:
            found.append(path)
        else:
            others[path.suffix.lower() or "without an ending"] += 1
    return found, others


def passed_over(folder: pathlib.Path, others: collections.Counter) -> list[str]:
    """A note on the other files of a folder; none if there are none."""
    return [f"note: {folder} has other files, passed over: {kinds(others)}"] if others else []


def kinds(others: collections.Counter) -> str:
    """Numbers of files of each kind: `"1 .db, 2 hidden"`."""
    return ", ".join(f"{number} {kind}" for kind, number in sorted(others.items()))


def on_disk(root: pathlib.Path) -> Files:
    """Images that are files below a folder."""
    return Files(
        root,
        open=lambda e: (root / e.path).open("rb"),
        size=lambda e: os.stat(root / e.path).st_size,
        stamp=lambda e: stamp(root / e.path),
    )


def check(images: Files, examples: list[Example]) -> None:
    """UserError unless every image is there and begins as an image does."""

    def wrong(example: Example) -> str | None:
        try:
            example.path.encode()
            with images.open(example) as file, Image.open(file):
                return None
        except UnicodeEncodeError:
            return "its name is no UTF-8"
        except FileNotFoundError:
            return "not there"
        except Image.DecompressionBombError:
            return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels"
        except Exception as e:  # Pillow's decoders raise anything
            return getattr(e, "strerror", None) or "no image"

    bad = [(e.path, why) for e, why in zip(examples, in_threads(wrong, examples)) if why]
    if bad:
        shown = lambda path: path.encode(errors="backslashreplace").decode()
        listed = some([f"{shown(path)} ({why})" for path, why in bad])
        raise UserError(
            f"{len(bad)} of {len(examples)} files of {images.root} cannot be used: {listed}: remove or "
            f"replace them"
        )


def copies(images: Files, examples: list[Example]) -> list[list[int]]:
    """Numbers of examples whose bytes are the same, in groups of two and more."""
    sizes = list(map(images.size, examples))
    number = collections.Counter(sizes)
    maybe = [i for i, size in enumerate(sizes) if number[size] > 1]  # only these are read
    groups = collections.defaultdict(list)
    digest = lambda i: hashlib.sha256(images.read(examples[i])).digest()
    for i, value in zip(maybe, in_threads(digest, maybe)):
        groups[value].append(i)
    return [group for group in groups.values() if len(group) > 1]


def in_threads(function: Callable, items: list) -> Iterator[Any]:
    """The values of a function of each item, in order; few of a million wait at once."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), _AT_ONCE):
            yield from pool.map(function, items[start : start + _AT_ONCE])


def some(names: Iterable[str]) -> str:
    """The first few names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
