"""Labelled images of one's own as values, and how their bytes are reached."""

import collections
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, PngImagePlugin

from rlrr_jax import files
from rlrr_jax.data.task import stamp
from rlrr_jax.errors import UserError

# Pillow takes a picture with a longer text in it, such as a drawing's source, for a bomb.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26
ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".tga"),
)
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"dev": "val", "test": "test", "testing": "test"}
UNREAD = {".heic": "HEIC", ".heif": "HEIC", ".cr2": "raw", ".nef": "raw", ".arw": "raw", ".dng": "raw"}
JUNK = ("@eaDir", "$RECYCLE.BIN", "__MACOSX", "System Volume Information", "lost+found", "#recycle")
SHOWN = 5  # files or classes in a message
_AT_ONCE = 10_000  # images that wait for a thread


class Example(NamedTuple):
    """A labelled image.

    Attributes:
      path: path below the folder or beside the list, or an absolute one; the key of the division.
      label: name of its class; of several labels their names `a;b`, of values the number.
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
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts):
            others["hidden"] += 1
        elif any(part in JUNK for part in parts):
            others["in folders of the system"] += 1
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
            ending = pathlib.PurePath(example.path).suffix.lower()
            if ending in UNREAD:
                return f"{UNREAD[ending]}, which is not read: convert it to JPEG"
            return getattr(e, "strerror", None) or "no image"

    bad = [(e.path, why) for e, why in zip(examples, in_threads(wrong, examples)) if why]
    if bad:
        raise Unusable(images.root, len(examples), bad)


class Unusable(UserError):
    """Images that cannot be used.

    Attributes:
      bad: `[(path, why), ...]`, all of them.
      number: of images that were looked at.
    """

    def __init__(self, root: Any, number: int, bad: list[tuple[str, str]]) -> None:
        shown = lambda path: path.encode(errors="backslashreplace").decode()
        self.bad, self.number = [(shown(path), why) for path, why in bad], number
        listed = some([f"{path} ({why})" for path, why in self.bad])
        super().__init__(
            f"{len(bad)} of {number} files of {root} cannot be used: {listed}: remove or replace them"
        )


def of_pixels(images: Files, examples: list[Example]) -> list[str]:
    """Notes on images that are transparent, that have 16 bits and use few of them, or several pages."""

    def kind(example: Example) -> str | None:
        # Where Pillow cannot say, decoding says what is wrong.
        with contextlib.suppress(Exception), images.open(example) as file, Image.open(file) as image:
            if getattr(image, "n_frames", 1) > 1:
                return "pages"
            top: Any = image.getextrema() if image.mode.startswith("I") else None
            if top and top[1] < 1 << 12:
                return "dark"
            if image.mode in ("RGBA", "LA", "PA", "P") and image.has_transparency_data:
                alpha: Any = image.convert("RGBA").getchannel("A").getextrema()
                return "transparent" if alpha[0] < 255 else None
        return None

    found = collections.defaultdict(list)
    ends = (".png", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".avif", ".tga", ".bmp", ".jp2")
    maybe = [e for e in examples if pathlib.PurePath(e.path).suffix.lower() in ends]
    for example, what in zip(maybe, in_threads(kind, maybe)):
        found[what].append(example.path)
    texts = {
        "transparent": "are transparent, and are laid on white",
        "dark": "have 16 bits, use a sixteenth of their range, and come out nearly black: scale them",
        "pages": "have several pages or frames, of which the first is taken",
    }
    kinds = {"dark": "warning"}
    return [
        f"{kinds.get(what, 'note')}: {len(found[what])} of {len(examples)} images {text} "
        f"({some(found[what])})"
        for what, text in texts.items()
        if found[what]
    ]


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
