"""Whether prepared VTAB-1k data is what everybody has: sizes, keys, order, labels, fingerprints."""

import hashlib
import json
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from rlrr_jax import files
from rlrr_jax.data import sources, tasks, vtab
from rlrr_jax.data.task import Found
from rlrr_jax.errors import UserError, first_line

FINGERPRINTS = "rlrr_jax_fingerprints.json"  # in the data folder
# Sizes of tfds splits that the positions in `vtab` assume.
SIZES = {
    "cifar10": {"train": 50000, "test": 10000},
    "cifar100": {"train": 50000, "test": 10000},
    "caltech101": {"train": 3060, "test": 6084},
    "dtd": {"train": 1880, "validation": 1880, "test": 1880},
    "oxford_flowers102": {"train": 1020, "validation": 1020, "test": 6149},
    "oxford_iiit_pet": {"train": 3680, "test": 3669},
    "svhn_cropped": {"train": 73257, "test": 26032},
    "sun397/tfds": {"train": 76127, "validation": 10875, "test": 21750},
    "patch_camelyon": {"train": 262144, "validation": 32768, "test": 32768},
    "eurosat/rgb": {"train": 27000},
    "resisc45": {"train": 31500},
    "diabetic_retinopathy_detection/btgraham-300": {"train": 35126, "validation": 10906, "test": 42670},
    "clevr": {"train": 70000, "validation": 15000},
    "dmlab": {"train": 65550, "validation": 22628, "test": 22735},
    "kitti": {"train": 6347, "validation": 423, "test": 711},
    "dsprites": {"train": 737280},
    "smallnorb": {"train": 24300, "test": 24300},
}
# One file was dropped without a new version; it lies behind the 800 that VTAB takes.
ALSO = {"sun397/tfds": {"train": 76128}}

# Where a builder stores its shuffling key: the field, and key(value, example, features).
_same = lambda value, example, features: value
_in_class = lambda value, example, features: f"{features['label'].int2str(example['label'])}_{value}"
KEYS = {
    "cifar10": ("id", lambda value, example, features: int(value[-5:])),
    "cifar100": ("id", lambda value, example, features: int(value[-5:])),
    "dtd": ("file_name", _same),
    "oxford_flowers102": ("file_name", _same),
    "oxford_iiit_pet": ("file_name", _same),
    "svhn_cropped": ("id", lambda value, example, features: int(value[-6:])),
    "sun397/tfds": ("file_name", _same),
    "patch_camelyon": ("id", _same),
    "eurosat/rgb": ("filename", _in_class),
    "resisc45": ("filename", _in_class),
    "diabetic_retinopathy_detection/btgraham-300": ("name", _same),
    "clevr": ("file_name", _same),
    "dmlab": ("filename", _same),
    "kitti": ("image/file_name", _same),
}


def look(name: str, data_dir: Any, kind: str | None = None) -> str:
    """What there is of a task, by its sizes; records its fingerprint. Raises UserError if unusable."""
    found = sources.find(name, data_dir, kind)
    if found.kind == "tfds":
        _check_sizes(name, found)
    numbers = [sources.open_split(name, split, found).number for split in tasks.get(name).splits]
    text = f"{found.dataset}, {'/'.join(map(str, numbers))} images"
    if _way(name, found) == "fingerprint":
        text += f", {compare_fingerprint(name, data_dir, found)}"
    return text


# Checking -------------------------------------------------------------------------------------


def check(name: str, data_dir: Any, kind: str | None = None) -> str:
    """Says how a task was checked; raises UserError if it is not what VTAB-1k is.

    Always: sizes of the splits and range of the labels. Then one of: labels computed from the
    dSprites factors; the md5 order of stored keys; a fingerprint recorded at first preparation.
    """
    name = tasks.canonical(name)
    found = sources.find(name, data_dir, kind)
    way = _way(name, found)
    if found.kind == "tfds":
        _check_sizes(name, found)
    for split in tasks.get(name).splits:
        labels = _labels(name, split, found)
        classes = tasks.get(name).classes
        if not 0 <= labels.min() <= labels.max() < classes:
            raise UserError(
                f"labels of {name} {split} go from {labels.min()} to {labels.max()} instead of 0 to "
                f"{classes - 1}: prepare it again"
            )
        if way == "factors":
            _check_factors(name, split, labels, found)
    if way == "keys":
        _check_keys(name, found)
        how = "the md5 order of its keys"
    elif way == "factors":
        how = "labels computed from the factors"
    else:
        how = compare_fingerprint(name, data_dir, found)
    numbers = "/".join(str(tasks.get(name).number(split)) for split in tasks.get(name).splits)
    return f"{found.dataset}, {numbers} images, labels in range, {how}"


def _way(name, found):
    if name.startswith("dsprites"):
        return "factors"
    task = tasks.get(name)
    if found.kind != "tfds" or task.tfds not in KEYS:
        return "fingerprint"
    builder, _ = sources.open_tfds(found, task.splits["test"], {task.image})
    return "keys" if KEYS[task.tfds][0] in builder.info.features else "fingerprint"  # older: no key


def _labels(name, split, found):
    """All labels of a split; reads every example."""
    opened = sources.open_split(name, split, found)
    place, out = opened.tasks.index(name), []
    bar = tqdm(range(0, opened.number, 1000), desc=f"{name} {split}", disable=opened.number < 5000)
    for start in bar:
        out += [k[place] for _, k in opened.read(start, min(start + 1000, opened.number))]
    return np.array(out, int)


def _check_sizes(name, found):
    task = tasks.get(name)
    builder, _ = sources.open_tfds(found, task.splits["test"], {task.image})
    for split, number in SIZES[task.tfds].items():
        have = builder.info.splits[split].num_examples
        if have not in (number, ALSO.get(task.tfds, {}).get(split)):
            raise UserError(
                f"{found.path} has {have} examples in {split} instead of {number}: "
                f"delete that folder and prepare it again"
            )


def key_hash(split: str, key: Any) -> bytes:
    """What tfds sorts the examples of a split by: md5 of the split's name and the key."""
    key = key if isinstance(key, bytes) else str(key).encode()
    return hashlib.md5(split.encode() + key).digest()


def _check_keys(name, found):
    """UserError if examples are not in the order into which tfds brings them by their keys."""
    task = tasks.get(name)
    field, key_of = KEYS[task.tfds]
    for split in (*task.parts[:2], "test"):
        part = task.splits[split]
        builder, fetch = sources.open_tfds(found, part, {field, *task.fields})
        number, last = builder.info.splits[part].num_examples, b""
        for start in range(0, number, 1000):
            for i, example in enumerate(fetch(start, min(start + 1000, number)), start):
                value = example[field]
                value = value.decode() if isinstance(value, bytes) else str(value)
                now = key_hash(part.split("[")[0], key_of(value, example, builder.info.features))
                if now < last:
                    raise UserError(
                        f"example {i} of {found.path} {part!r} ({value}) is not where its key puts it: "
                        f"it was prepared by an old tfds (before 4.2) or changed, "
                        f"delete that folder and prepare it again"
                    )
                last = now


def dsprites_labels(name: str, split: str) -> np.ndarray:
    """The labels of a dSprites task, computed from the order of factors in its file.

    Image i has orientation i // 1024 % 40 and x position i // 32 % 32.
    """
    order = sorted(range(737280), key=lambda i: key_hash("train", i))
    part = {"train800": order[:800], "val200": order[589824:590024], "test": order[663552:]}
    part["train800val200"] = part["train800"] + part["val200"]
    index = np.array(part[split])
    if name == "dsprites_loc":
        return vtab.position_bin({"label_x_position": index // 32 % 32})
    return vtab.orientation_bin({"label_orientation": index // 1024 % 40})


def _check_factors(name, split, labels, found):
    expected = dsprites_labels(name, split)
    if found.kind == "folder":  # its lists are interleaved
        labels, expected = np.sort(labels), np.sort(expected)
    if not np.array_equal(labels, expected):
        raise UserError(
            f"the labels of {name} {split} in {found.path} are not those of dSprites: prepare it again"
        )


def fingerprint(name: str, found: Found) -> str:
    """SHA-256 of the encoded images and labels to train and choose on, and of all test labels."""
    digest = hashlib.sha256()
    for split in tasks.get(name).parts[:2]:
        opened = sources.open_split(name, split, found)
        place = opened.tasks.index(name)
        for image, labels in opened.read(0, opened.number):
            digest.update(hashlib.sha256(image).digest() + int(labels[place]).to_bytes(2))
    digest.update(_labels(name, "test", found).astype("<i4").tobytes())
    return digest.hexdigest()


def compare_fingerprint(name: str, data_dir: Any, found: Found) -> str:
    """Compares a fingerprint with the recorded one, or records it; says which."""
    path = epath.Path(data_dir) / FINGERPRINTS
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as e:
        raise UserError(f"{path} is damaged ({first_line(e)}): restore it, or delete it") from e
    key, now = f"{name} ({found.dataset})", fingerprint(name, found)
    if key not in known:
        try:
            files.write_json(path, {**known, key: now})
        except PermissionError:
            return f"fingerprint {now[:12]}, not recorded because {data_dir} cannot be written"
        return f"fingerprint {now[:12]} recorded for the first time"
    if known[key] != now:
        raise UserError(
            f"the fingerprint of {key} is {now[:12]} and not {known[key][:12]} as recorded in {path}: "
            f"its images or labels changed; restore it, or delete that line to accept the change"
        )
    return f"fingerprint {now[:12]} as recorded"
