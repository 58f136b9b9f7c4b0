"""Splits as arrays: decoded and resized once with Pillow, then memory-mapped from a cache folder."""

import contextlib
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from rlrr_jax import files
from rlrr_jax.data import crops, sources, tasks
from rlrr_jax.errors import UserError

_BLOCK = 256  # images that are decoded, written and checked together
_FORMAT = 1  # of an entry
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
      folder: of the entry.
      split: the `sources.Split` it is made of.
      side: of the stored images.
      key: plain values; everything that shapes the images.
    """

    folder: Any
    split: sources.Split
    side: int
    key: dict

    @property
    def bytes(self):
        """Size of the images."""
        return self.split.number * self.side**2 * 3


def decode(image, size, variant="original", scale=1, shorter=None):
    """An RGB image [size, size, 3] uint8 from encoded bytes or an array.

    The authors' preprocessing: Pillow's bicubic resize (antialiased), the aspect ratio ignored.

    Args:
      variant, scale: see `rgb`.
      shorter: big_vision's evaluation instead: the middle of the image with its shorter side
        resized to so many pixels (`crops.central`).
    """
    image = rgb(image, variant, scale)
    if shorter:
        return crops.central(np.asarray(image), size, shorter)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def rgb(image, variant="original", scale=1):
    """An RGB Pillow image from encoded bytes or an array.

    Args:
      variant: "jpeg75" saves and loads the image as JPEG of quality 75, 4:2:0.
      scale: what pixel values are multiplied by first (dsprites is stored as 0 and 1).
    """
    image = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.uint8(np.round(np.asarray(image) / 257)))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits")
    image = image.convert("RGB")
    if scale != 1:
        image = Image.fromarray(np.asarray(image) * np.uint8(scale))
    if variant == "jpeg75":
        image = Image.open(io.BytesIO(sources.jpeg75(image))).convert("RGB")
    return image


def load_split(name, split, size, variant="original", found=None, cache_dir=None, shorter=None):
    """Images and labels of a split, in the source's order.

    Args:
      name: of the task.
      split: one of the task's, such as "train800" or "test".
      size: of the images the model takes. Small images of one size are kept as they are, and are
        to be resized on the device (`resize.bicubic`, bit-equal to Pillow).
      variant: "original" or "jpeg75".
      found: the `sources.Found`; None looks in the default places.
      cache_dir: of decoded images; None is ~/.cache/rlrr_jax.
      shorter: see `decode`.

    Returns:
      images [N, side, side, 3] uint8 (a NumPy array, or `Images` in a file) and labels [N] int32.

    Raises:
      UserError: if an image is damaged, a label is impossible or the disk is too small.
    """
    name = tasks.canonical(name)
    found = found or sources.find(name)
    if found.kind == "bundled":
        source = sources.open_split(name, split, found)
        side = size if shorter else tasks.get(name).side
        images = [decode(i, side, variant, shorter=shorter) for i, _ in source.read(0, None)]
        labels = np.array([label for _, (label,) in source.read(0, None)], np.int32)
        return np.stack(images), labels
    entry = locate(name, split, size, variant, found, cache_dir, shorter)
    entry.folder.parent.mkdir(parents=True, exist_ok=True)
    with files.lock(entry.folder.parent, f".{entry.folder.name}.lock", wait=True):
        if not intact(entry):
            build(entry, name, split)
    labels = np.load(entry.folder / f"labels-{name}.npy", allow_pickle=False)
    return Images(entry.folder / "images.npy"), labels


def load_crops(name, split, size, kind, shorter, variant="original", found=None):
    """The `crops.Crops` of a training split, decoded anew in each epoch, and its labels [N] int32.

    Args:
      kind, shorter: see `crops.Crops`; the others as in `load_split`.
    """
    name = tasks.canonical(name)
    found = found or sources.find(name)
    source = sources.open_split(name, split, found)
    scale = tasks.get(name).scale if found.kind == "tfds" else 1
    mine = source.tasks.index(name)
    labels = []
    for start in range(0, source.number, _BLOCK):
        examples = source.read(start, min(start + _BLOCK, source.number))
        labels += [values[mine] for _, values in examples]
    labels = np.array(labels, np.int32)
    _check_labels(name, split, labels)

    def read(i):
        ((image, _),) = source.read(i, i + 1)
        with readable(source, i):
            return np.asarray(rgb(image, variant, scale))

    return crops.Crops(read, source.number, kind, size, shorter), labels


def locate(name, split, size, variant="original", found=None, cache_dir=None, shorter=None):
    """The `Entry` of a split. Tasks that have the same images share it."""
    task = tasks.get(name)
    found = found or sources.find(name)
    source = sources.open_split(name, split, found)
    native = not shorter and 0 < task.side <= size and _side(source) == task.side
    side = task.side if native else size
    key = {
        **source.key,
        **dict(side=side, native=native, scale=task.scale if found.kind == "tfds" else 1),
        **dict(labels=[_code(tasks.get(name).label) for name in source.tasks]),
        **dict(variant=variant if found.kind == "tfds" else "stored"),
        **dict(pillow=PIL.__version__, format=_FORMAT, tasks=list(source.tasks)),
        **(dict(shorter=shorter) if shorter else {}),
    }
    key = json.loads(json.dumps(key))
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
    stem = found.dataset.replace("/", "-").replace(":", "-")
    folder = _cache(cache_dir) / "images" / f"{stem}-{split}-{side}px-{key['variant']}-{mark}"
    return Entry(folder, source, side, key)


def _side(source):
    """Side of the first image if it is a square, else None."""
    try:
        width, height = Image.open(io.BytesIO(source.read(0, 1)[0][0])).size
    except (OSError, ValueError, IndexError):  # said when it is decoded
        return None
    return width if width == height else None


def _code(function):
    """What changes when a label function is edited."""
    code = function.__code__
    values = [cell.cell_contents for cell in function.__closure__ or ()]
    text = f"{code.co_code.hex()} {code.co_consts} {code.co_names} {values}"
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _cache(cache_dir):
    if "://" in str(cache_dir):
        raise UserError(
            f"config.data.cache_dir={cache_dir} is no local folder: images are mapped from it"
        )
    return pathlib.Path(cache_dir or "~/.cache/rlrr_jax").expanduser()


def missing_bytes(entries):
    """Bytes that entries will take that are not in the cache, each counted once."""
    new = {e.folder: e.bytes for e in entries if not (e.folder / "entry.json").exists()}
    return sum(new.values())


def check_space(wanted, cache_dir=None):
    """UserError if so many bytes do not fit into the cache folder's disk."""
    folder = _cache(cache_dir)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"the decoded images take {wanted / 1e9:.1f} GB and {_cache(cache_dir)} has "
            f"{free / 1e9:.1f} GB free: make space, or point config.data.cache_dir at a larger disk"
        )


def intact(entry):
    """Whether an entry is there and every byte of it is what was written."""
    try:
        saved = files.read_json(entry.folder / "entry.json")
        if saved["key"] != entry.key:
            return False
        labels = [(entry.folder / f"labels-{t}.npy").read_bytes() for t in entry.split.tasks]
        images = Images(entry.folder / "images.npy")
        if images.shape != (entry.split.number, entry.side, entry.side, 3):
            return False
        with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # a block of images each
            starts = range(0, len(images), _BLOCK)
            sums = list(pool.map(lambda i: zlib.crc32(images[i : i + _BLOCK]), starts))
        return saved["crc32"] == {"images": sums, "labels": [zlib.crc32(x) for x in labels]}
    except (OSError, ValueError, KeyError, EOFError):
        return False


def build(entry, name, split):
    """Decodes a split into its entry; the folder appears when it is complete."""
    check_space(entry.bytes, entry.folder.parents[1])
    part = entry.folder.with_name(entry.folder.name + ".part")
    for old in (part, entry.folder):
        if old.exists():
            shutil.rmtree(old)
    part.mkdir()
    number, shape = entry.split.number, (entry.split.number, entry.side, entry.side, 3)
    labels = np.empty((len(entry.split.tasks), number), np.int32)
    sums = []
    with (
        (part / "images.npy").open("wb") as f,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=number, desc=f"decoding {name} {split}", unit="img", disable=number < 5000) as bar,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(f, header)
        for start in range(0, number, _BLOCK):
            examples = entry.split.read(start, min(start + _BLOCK, number))
            put = functools.partial(_decode, entry, tasks.get(name))
            block = np.stack(list(pool.map(put, enumerate(examples, start))))
            labels[:, start : start + len(block)] = np.array([k for _, k in examples], np.int32).T
            sums.append(zlib.crc32(block))
            f.write(block)
            bar.update(len(block))
        f.flush()
        os.fsync(f.fileno())
    for task, values in zip(entry.split.tasks, labels):
        _check_labels(task, split, values)
        np.save(part / f"labels-{task}.npy", values)
    label_sums = [zlib.crc32((part / f"labels-{t}.npy").read_bytes()) for t in entry.split.tasks]
    files.write_json(
        part / "entry.json", {"key": entry.key, "crc32": {"images": sums, "labels": label_sums}}
    )
    part.rename(entry.folder)


def _decode(entry, task, item):
    i, (image, _) = item
    with readable(entry.split, i):
        if entry.key["native"] and Image.open(io.BytesIO(image)).size != (entry.side,) * 2:
            raise OSError(f"its size is not {entry.side} x {entry.side}")
        key = entry.key
        return decode(image, entry.side, key["variant"], key["scale"], key.get("shorter"))


@contextlib.contextmanager
def readable(split, i):
    """Explains whatever Pillow raises for the image `i` of a `sources.Split`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:  # its decoders raise anything
        why = "it is no image" if isinstance(e, PIL.UnidentifiedImageError) else e
        raise UserError(f"{split.where(i)} is damaged ({why}): prepare it again") from e


def _check_labels(name, split, labels):
    classes = tasks.get(name).classes
    if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"labels of {name} {split} go from {labels.min()} to {labels.max()}, but the task has "
            f"{classes} classes: the dataset is not the expected one, prepare it again"
        )
