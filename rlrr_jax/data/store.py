"""Splits as arrays: decoded and resized once with Pillow, then memory-mapped from a cache folder."""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import PIL
from etils import epath
from PIL import ExifTags, Image
from tqdm import tqdm

from rlrr_jax import files
from rlrr_jax.data import crops, sources, tasks
from rlrr_jax.data.examples import Unusable
from rlrr_jax.data.task import Found, Split, Task
from rlrr_jax.errors import UserError
from rlrr_jax.sides import Size, pair, text

_BLOCK = 256  # images that are decoded, written and checked together
_FORMAT = 2  # of an entry
_NOT_THERE = " is not there"
# Decoded again by another major version only: others have given the same pixels.
_PILLOW = int(PIL.__version__.partition(".")[0])
VARIANTS = ("original", "jpeg75")


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


class Pixels(NamedTuple):
    """What is made of an image.

    Attributes:
      size: size of the images that the model takes, see `sides`.
      variant: "jpeg75" saves and loads each image as JPEG of quality 75, 4:2:0, before anything else.
      shorter: big_vision's evaluation instead of the whole image: the middle of the image with its
        shorter side resized to so many pixels (`crops.central`).
      upright: whether the image is turned as its EXIF says, as viewers show it.
      white: whether a transparent image is laid on white, as viewers show it; else alpha is dropped, as
        in VTAB's numbers.
    """

    size: Size
    variant: str = "original"
    shorter: int | None = None
    upright: bool = False
    white: bool = False


def pixels_for(size: Size, crop: str | None, crop_from: int | None, **options: Any) -> Pixels:
    """What is stored of the images of a run, which are cut from it by `crop`, see `crops`.

    Args:
      size: size of the images that the model takes, see `sides`.
      crop: a name of `crops.KINDS`, or None.
      crop_from: shorter side, or side of the whole square, that crops are cut from.
      **options: other values of `Pixels`.
    """
    if crops.by_host(crop):
        return Pixels(size, shorter=crop_from, **options)
    return Pixels((crop_from if crop else None) or size, **options)


def _pixels(pixels):
    return pixels if isinstance(pixels, Pixels) else Pixels(pixels)


def decode(image: Any, pixels: Any, scale: int = 1) -> np.ndarray:
    """An RGB image [height, width, 3] uint8 from encoded bytes or an array.

    The authors' preprocessing: Pillow's bicubic resize (antialiased), the aspect ratio ignored.

    Args:
      image: encoded bytes, or an array [H, W] or [H, W, 3] of uint8.
      pixels: a `Pixels`, or just the size.
      scale: factor of the pixel values (dsprites is stored as 0 and 1).
    """
    pixels = _pixels(pixels)
    image = rgb(image, pixels, scale)
    if pixels.shorter:
        return crops.central(np.asarray(image), pixels.size, pixels.shorter)
    size = pair(pixels.size)[::-1]  # Pillow's width comes first
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


def rgb(image: Any, pixels: Pixels, scale: int = 1) -> Image.Image:
    """An RGB Pillow image of its own size; arguments are those of `decode`."""
    image = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
    if pixels.upright:
        image = _upright(image)
    if image.mode == "I" and image.format == "PPM":  # a PGM of 16 bits, which Pillow brings to 65535
        image = Image.fromarray(np.uint16(np.clip(np.asarray(image), 0, 65535)))
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.uint8(np.round(np.asarray(image) / 257)))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = _on_white(image) if pixels.white else image
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns of the direct way
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if scale != 1:
        image = Image.fromarray(np.asarray(image) * np.uint8(scale))
    if pixels.variant == "jpeg75":
        image = Image.open(io.BytesIO(sources.jpeg75(image))).convert("RGB")
    return image


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF's orientation says; the rest of EXIF, which may be wrong, is not read."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    """An image with transparency as viewers show it; one that is opaque everywhere keeps its pixels."""
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)


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
      images [N, side, side, 3] uint8 (a NumPy array, or `Images` in a file) and labels [N] int32.

    Raises:
      UserError: if an image is damaged, a label is impossible or the disk is too small.
    """
    task, pixels = tasks.get(task), _pixels(pixels)
    found = found or sources.find(task)
    if found.kind == "bundled":
        source = sources.open_split(task, split, found)
        small = not pixels.shorter and task.side <= min(pair(pixels.size))
        pixels = pixels._replace(size=task.side) if small else pixels
        images = [decode(i, pixels) for i, _ in source.read(0, None)]
        labels = np.array([label for _, (label,) in source.read(0, None)], np.int32)
        return np.stack(images), labels
    entry = locate(task, split, pixels, found, cache_dir)
    if not intact(entry):  # one that is whole may lie on a read-only disk
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        (entry.folder.parent / _TAG).write_text(_TAG_TEXT)
        with files.lock(entry.folder.parent, f".{entry.folder.name}.lock", wait=True) as held:
            if not intact(entry):  # nobody made it while we waited
                try:
                    build(entry, task, split, held)
                except Unusable as e:
                    raise _with_others(e, task, split, found, pixels) from e
    labels = np.load(entry.folder / f"labels-{task.name}.npy", allow_pickle=False)
    _check_rule(entry, task, labels)
    return Images(entry.folder / "images.npy"), labels


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
    return crops.Crops(read, source.number, kind, pixels, seed), labels


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
        **dict(format=_FORMAT, pillow=_PILLOW, split=split),
        **dict(tasks=list(source.tasks), labels=[_named(n, task).rule for n in source.tasks]),
        **(dict(shorter=pixels.shorter) if pixels.shorter else {}),
        **(dict(upright=True) if pixels.upright else {}),
        **(dict(white=True) if pixels.white else {}),
    }
    key = json.loads(json.dumps(key))
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
    stem = found.dataset.replace("/", "-").replace(":", "-")
    folder = images_folder(cache_dir) / f"{stem}-{split}-{text(side)}px-{key['variant']}-{mark}"
    return Entry(folder, source, side, key)


def _side(source):
    """Side of the first image if it is a square, else None."""
    try:
        width, height = Image.open(io.BytesIO(source.read(0, 1)[0][0])).size
    except (OSError, ValueError, IndexError):  # reported when it is decoded
        return None
    return width if width == height else None


def images_folder(cache_dir: str | None = None) -> pathlib.Path:
    """Where decoded images lie."""
    if "://" in str(cache_dir):
        raise UserError(
            f"config.data.cache_dir={cache_dir} is no local folder: images are mapped from it"
        )
    return files.cache(cache_dir) / "images"


_TAG = "CACHEDIR.TAG"  # marks folders of caches (bford.info/cachedir), ours among them
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Decoded images of rlrr_jax.\n"


def is_ours(cache_dir: str | None) -> bool:
    """Whether images were decoded into a cache before."""
    if cache_dir is None or "://" in str(cache_dir):
        return False
    root = images_folder(cache_dir)
    tagged = (root / _TAG).is_file() and (root / _TAG).read_text(errors="replace") == _TAG_TEXT
    return tagged or (root.is_dir() and any(map(_made, root.iterdir())))


def described(cache_dir: str | None = None) -> str:
    """What lies in the cache already, in words that follow a sentence; empty if nothing does."""
    there = entries(cache_dir)
    if not there:
        return ""
    unused = [size for _, size, why in there if why and not why.endswith(_NOT_THERE)]
    text = f"; {images_folder(cache_dir)} holds {sum(e[1] for e in there) / 1e9:.2f} GB"
    if unused:
        text += f", {sum(unused) / 1e9:.2f} GB of no use any more (python -m rlrr_jax.prepare --prune)"
    return text


def entries(cache_dir: str | None = None, thorough: bool = False) -> list:
    """What lies in the cache: `[(folder, bytes, why no task uses it or None), ...]`.

    Folders that are not as `build` makes them are somebody's own, and not among them.

    Args:
      thorough: whether to see if the dataset is still the one that was decoded.
    """
    root, out = images_folder(cache_dir), []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        try:
            if not _made(folder):
                continue
            size = sum(path.stat().st_size for path in folder.iterdir())
        except FileNotFoundError:  # another process has just finished or removed it
            continue
        out.append((folder, size, _unused(folder, thorough)))
    return out


_ENTRY = re.compile(r".+-(original|jpeg75|stored)-[0-9a-f]{10}")
_PART = re.compile(rf"\.{_ENTRY.pattern}\.[0-9a-f]{{8}}\.part")
_FILE = re.compile(r"images\.npy|labels-.+\.npy|entry\.json|\.[0-9a-f]{12}\.part(\.json)?")


def _made(folder: pathlib.Path) -> bool:
    """Whether a folder has the name and the files of an entry (or of one in the making) alone."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    whole = _ENTRY.fullmatch(folder.name) and (folder / "entry.json").is_file()
    if not whole and not _PART.fullmatch(folder.name):
        return False
    return all(_FILE.fullmatch(p.name) and p.is_file() and not p.is_symlink() for p in folder.iterdir())


def foreign(cache_dir: str | None = None) -> list:
    """Names in the folder of decoded images that `prune` leaves alone, since we did not make them."""
    root = images_folder(cache_dir)
    mine = {_TAG, *(folder.name for folder, *_ in entries(cache_dir))}
    there = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    return [name for name in there if name not in mine and not re.fullmatch(r"\..*\.lock", name)]


def _unused(folder, thorough):
    if folder.name.endswith(".part"):
        return "its decoding was interrupted, or goes on in another process"
    try:
        key = json.loads((folder / "entry.json").read_text())["key"]
        if key["format"] != _FORMAT:
            return "made by an older version of rlrr_jax"
        if key["pillow"] != _PILLOW:
            return f"decoded by Pillow {key['pillow']}, this is {_PILLOW}"
        if "own" in key:  # a user's images, of which any list may come again
            return None if os.path.exists(key["own"]) else f"its images {key['own']}{_NOT_THERE}"
        if key["labels"] != [tasks.get(name).rule for name in key["tasks"]]:
            return "its labels are of an older version"
        if "path" not in key and "folder" not in key:  # of a data source that a fork added
            return None
        kind = "tfds" if "path" in key else "folder"
        path = epath.Path(key["path"] if kind == "tfds" else key["folder"])
        if not path.exists():
            return f"its dataset {path}{_NOT_THERE}"
        if thorough:
            found = sources.Found(kind, path, key.get("dataset", ""))
            now = json.loads(json.dumps(sources.open_split(key["tasks"][0], key["split"], found).key))
            if any(key.get(name) != value for name, value in now.items()):
                return f"its dataset {path} has changed"
    except UserError as e:
        return f"its dataset cannot be read: {e}"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return "made by an older version of rlrr_jax, or damaged"
    return None


def prune(cache_dir: str | None = None) -> list:
    """Removes what no task uses, and returns it as `entries` does.

    What is being decoded stays, and so does what belongs to a dataset that is not there.
    """
    removed, root = [], images_folder(cache_dir)
    for folder, size, why in entries(cache_dir, thorough=True):
        if why is None or why.endswith(_NOT_THERE):  # a disk may come back
            continue
        name = folder.name.strip(".").removesuffix(".part").partition(".part")[0]
        name = re.sub(r"\.[0-9a-f]{8}$", "", name) if folder.name.endswith(".part") else name
        try:
            with files.lock(root, f".{name}.lock") as held:  # which whoever decodes it holds
                if not held and folder.name.endswith(".part"):
                    continue
                shutil.rmtree(folder)
        except UserError:
            continue
        removed.append((folder, size, why))
    return removed


def missing_bytes(entries: list) -> int:
    """Bytes that entries will take that are not in the cache, each counted once."""
    new = {e.folder: e.bytes for e in entries if not (e.folder / "entry.json").exists()}
    return sum(new.values())


def check_space(wanted: int, cache_dir: str | None = None) -> None:
    """UserError if so many bytes do not fit into the cache folder's disk."""
    folder = root = images_folder(cache_dir)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"the decoded images take {wanted / 1e9:.1f} GB and {root} has "
            f"{free / 1e9:.1f} GB free: make space, or point config.data.cache_dir at a larger disk"
        )


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
    check_space(entry.bytes, entry.folder.parents[1])
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
            put = functools.partial(_attempt, entry, task)
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


def _attempt(entry, task, item):
    """An image, or the UserError of one that cannot be decoded."""
    try:
        return _decode(entry, task, item)
    except UserError as e:
        return e


_HOW = {"shorter": None, "upright": False, "white": False}  # keys of an entry, in the order of `Pixels`


def _decode(entry, task, item):
    i, (image, _) = item
    with readable(entry.split, i):
        if entry.key["native"] and Image.open(io.BytesIO(image)).size != (entry.side,) * 2:
            raise OSError(f"its size is not {entry.side} x {entry.side}")
        key = entry.key
        how = (key.get(name, default) for name, default in _HOW.items())
        pixels = Pixels(entry.side, key["variant"], *how)
        return decode(image, pixels, key["scale"])


@contextlib.contextmanager
def readable(split: Split, i: int) -> Iterator[None]:
    """Explains whatever Pillow raises for the image `i` of a `sources.Split`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:  # its decoders raise anything
        why = "it is no image" if isinstance(e, PIL.UnidentifiedImageError) else e
        own = "own" in split.key
        fault = "cannot be used" if own else "is damaged"
        way = "remove or replace it" if own else "prepare it again"
        raise UserError(f"{split.where(i)} {fault} ({why}): {way}") from e


def _check_labels(task, split, labels):
    classes = task.classes
    if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"labels of {task.name} {split} go from {labels.min()} to {labels.max()}, but the task has "
            f"{classes} classes: the dataset is not the expected one, prepare it again"
        )
