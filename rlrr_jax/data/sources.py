"""Where images come from: bundled files, prepared tfds datasets, VTAB-1k folders. No TensorFlow.

All give the same: for a split, its number of examples and encoded images with labels, in order.
"""

import contextlib
import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from rlrr_jax.data import tasks, tfrecord
from rlrr_jax.data.task import Found, Source, Split, Task, stamp
from rlrr_jax.errors import UserError, first_line

BUNDLED = pathlib.Path(__file__).parents[1] / "bundled"
KINDS = ("tfds", "folder")
FORMATS = ("array_record", "tfrecord")


class Twice(UserError):
    """A task's images are there in two forms, and none was chosen."""


def find(task: str | Task, data_dir: Any = None, kind: str | None = None) -> Found:
    """Where a task's examples are: of the kind asked for, else the one that is there.

    Args:
      task: a `Task`, or its name.
      data_dir: folder of tfds datasets, or of (or above) a `vtab-1k` folder; None is tfds's default.
      kind: "tfds", "folder" or None.

    Raises UserError if there is none, or if both are there and `kind` is None.
    """
    task = tasks.get(task)
    return _source(task).find(task, data_dir, kind)


def _find_bundled(task, data_dir, kind):
    return Found("bundled", BUNDLED / f"{task.name}.npz", task.name)


def _find_vtab(task, data_dir, kind):
    name = task.name
    root = epath.Path(data_dir or "~/tensorflow_datasets").expanduser()
    try:
        root.exists()
    except ImportError as e:  # etils reads gs:// through gcsfs, or TensorFlow where that is installed
        raise UserError(f"{root} cannot be reached ({first_line(e)}): pip install gcsfs") from e
    found = {}
    for version in versions(root / task.tfds, task):
        found.setdefault("tfds", Found("tfds", root / task.tfds / version, f"{task.tfds}:{version}"))
    for folder in (root / "vtab-1k" / name, root / name):
        if (folder / "test.txt").exists():
            found.setdefault("folder", Found("folder", folder, f"vtab-1k/{name}"))
    if kind is None and len(found) == 2:
        raise Twice(
            f"{name} is in {root} twice, as {found['tfds'].path} and as {found['folder'].path}, which "
            f"differ in their pixels: choose by --config.data.source=tfds or folder"
        )
    wanted = [kind] if kind else KINDS
    for choice in wanted:
        if choice in found:
            return found[choice]
    places = {
        "tfds": f"a prepared tfds dataset at {root / task.tfds / task.version}",
        "folder": f"a VTAB-1k folder at {root / 'vtab-1k' / name}",
    }
    raise UserError(
        f"there is no {' nor '.join(places[k] for k in wanted)[2:]}: prepare it by python -m "
        f"rlrr_jax.prepare --tasks {name} --data_dir {root}, or point config.data.dir at the folder "
        f"that has it"
    )


def versions(folder: Any, task: Task) -> list[str]:
    """Prepared versions with the images of a task, the best first."""
    if not folder.exists():
        return []
    names = [p.name for p in folder.iterdir() if (p / "dataset_info.json").exists()]
    numbers = {n: tuple(map(int, n.split("."))) for n in names if n.replace(".", "").isdigit()}
    right = [n for n in numbers if numbers[n][0] in task.majors]
    return sorted(right, key=lambda n: (n == task.version, numbers[n]), reverse=True)


def open_split(task: str | Task, split: str, found: Found) -> Split:
    """The examples of a `Split`, in the order of the source.

    Args:
      task: a `Task`, or its name.
      split: one of the task's, such as "train800" or "test".
      found: see `find`.

    Raises UserError if the dataset is damaged or has another number of examples.
    """
    task = tasks.get(task)
    opened = _source(task).open(task, split, found)
    number = task.number(split)
    if opened.number != number:
        raise UserError(
            f"{task.name} has {opened.number} {split} images instead of {number} in {found.path}: "
            + ("correct its list" if found.kind == "folder" else "prepare the dataset again")
        )
    return opened


def class_names(task: str | Task, found: Found) -> list[str]:
    """Names of a task's classes: its own, those that tfds keeps beside the dataset, or numbers."""
    task = tasks.get(task)
    names = task.names
    if found.kind == "folder" and task.source and task.source.names:
        names = task.source.names(task, found)
    if not names and found.kind == "tfds" and len(task.fields) == 1:
        path = epath.Path(found.path) / f"{task.fields[0]}.labels.txt"
        names = path.read_text().splitlines() if path.exists() else ()
    return list(names) if len(names) == task.classes else [str(i) for i in range(task.classes)]


LOOKED_AT = 32  # files of a folder


def pixels(task: str | Task, found: Found) -> tuple[str, int, int]:
    """What a source's pixels are: "original", "jpeg75" (as Pillow saves by default) or "stored".

    Second and third, of a folder, how many of some test images are JPEG with the tables of quality 75,
    and how many were looked at. The published folders were saved so; so are some original files.
    """
    if found.kind != "folder":
        return "original", 0, 0
    split = open_split(task, "test", found)
    which = np.unique(np.linspace(0, split.number - 1, min(LOOKED_AT, split.number)).astype(int))
    alike = sum(_is_75(split.read(int(i), int(i) + 1)[0][0]) for i in which)
    return "jpeg75" if alike == len(which) > 0 else "stored", alike, len(which)


def _is_75(image: Any) -> bool:
    try:
        with Image.open(io.BytesIO(image)) as jpeg:
            ours = Image.open(io.BytesIO(jpeg75(jpeg.convert("RGB"))))
            same = getattr(jpeg, "quantization", None) == ours.quantization and jpeg.layer == ours.layer
    except (OSError, AttributeError):  # no image at all is reported when it is decoded
        same = False
    return bool(same)


def jpeg75(image: Any) -> bytes:
    """An RGB Pillow image saved as the published VTAB-1k folders were: JPEG, quality 75, 4:2:0."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=75, subsampling="4:2:0")
    return out.getvalue()


def _open_bundled(task, split, found):
    with np.load(found.path, allow_pickle=False) as file:
        parts = task.splits[split].split("+")
        images = np.concatenate([file[f"{part}/images"] for part in parts])
        labels = np.concatenate([file[f"{part}/labels"] for part in parts])
    read = lambda start, stop: [(i, (k,)) for i, k in zip(images[start:stop], labels[start:stop])]
    return Split(len(labels), (task.name,), read, {}, lambda i: f"image {i} of {task.name} {split}")


def open_vtab(task: Task, split: str, found: Found) -> Split:
    """The examples of a split of a tfds dataset or a VTAB-1k folder."""
    return (_tfds if found.kind == "tfds" else _folder)(task, split, found)


# tfds -----------------------------------------------------------------------------------------


def _tfds(task, split, found):
    part = task.splits[split]
    sharing = tasks.sharing(task, split)
    labels_of = [t.label for t in sharing]
    fields = {task.image, *(field for t in sharing for field in t.fields)}
    builder, fetch = open_tfds(found, part, fields)
    info = builder.info.splits[part]

    def read(start, stop):
        with _readable(found, part, f"examples {start} to {stop - 1}"):
            return [(e[task.image], [f(e) for f in labels_of]) for e in fetch(start, stop)]

    instructions = [(pathlib.PurePath(f.filename).name, f.skip, f.take) for f in info.file_instructions]
    with _readable(found, part, "its files"):
        stats = [stamp(found.path / file) for file, *_ in instructions]
    key = {"dataset": found.dataset, "path": _absolute(found.path), "image": task.image}
    key |= {"files": instructions, "stamps": stats}
    where = lambda i: f"image {i} of {task.name} {split} ({found.path})"
    return Split(info.num_examples, tuple(t.name for t in sharing), read, key, where)


def _absolute(path):
    return str(path) if "://" in str(path) else str(pathlib.Path(path).absolute())


def open_tfds(found: Found, part: str, fields: Iterable[str]) -> tuple:
    """A prepared dataset's builder, and `(start, stop) -> examples` of a part, images undecoded.

    Args:
      found: see `find`.
      part: tfds's instruction, such as "train[:800]".
      fields: names of the fields that are needed.

    Raises UserError if the dataset is damaged, or in a format that needs TensorFlow.
    """
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    _check_classes(found)
    with _readable(found, part, "the split"):
        builder = tfds.builder_from_directory(found.path)
        stored_as = builder.info.file_format.value
        if stored_as not in FORMATS:
            raise UserError(
                f"{found.path} is stored as {stored_as}, which cannot be read without TensorFlow: "
                f"prepare it again by python -m rlrr_jax.prepare"
            )
        fetch = (_array_record if stored_as == "array_record" else _tfrecord)(builder, part, fields)
        return builder, fetch


def _check_classes(found: Found) -> None:
    """UserError if a dataset's description names classes of Python that are not tfds's own.

    tfds imports what it names.
    """
    path = epath.Path(found.path) / "features.json"
    try:
        said = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({first_line(e)}): prepare the dataset again") from e
    for name in _class_names(said):
        if "." in name and not name.startswith("tensorflow_datasets."):
            raise UserError(f"{path} names {name}, which is no class of tfds and is not imported")


def _class_names(node: Any) -> Iterator[str]:
    """What a description of features names as classes, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str):
                yield value
            yield from _class_names(value)
    elif isinstance(node, list):
        for value in node:
            yield from _class_names(value)


@contextlib.contextmanager
def _readable(found, part, what):
    """Explains whatever tfds's parsers and readers raise (a record that is cut off is None)."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"{found.path}, split {part!r}: cannot read {what} ({first_line(e)}); "
            f"delete that folder and prepare it again"
        ) from e


def _raw_images(features):
    """Decoders that leave every image encoded."""
    import tensorflow_datasets as tfds

    is_image = lambda f: isinstance(f, tfds.features.Image)
    return {k: tfds.decode.SkipDecoding() for k, f in features.items() if is_image(f)}


def _array_record(builder, part, fields):
    source = builder.as_data_source(part, decoders=_raw_images(builder.info.features))
    return lambda start, stop: source.__getitems__(list(range(start, stop)))


def _tfrecord(builder, part, fields):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({k: builder.info.features[k] for k in sorted(fields)})
    raw = _raw_images(features)

    @functools.cache
    def index():  # seconds for a large file, so not before a record is wanted
        return [
            record
            for f in builder.info.splits[part].file_instructions
            for record in tfrecord.index(epath.Path(f.filename), f.skip, f.take)
        ]

    return lambda start, stop: [
        features.deserialize_example_np(record, decoders=raw)
        for record in tfrecord.read(index()[start:stop])
    ]


# VTAB-1k folders ------------------------------------------------------------------------------


def _folder(task, split, found):
    """A folder as NOAH's get_vtab1k.py writes it: list files of `images/<split>/000000.jpg 3`."""
    path = found.path / f"{split}.txt"
    if not path.exists():
        raise UserError(
            f"there is no {path}, which lists the {split} images: extract the whole archive"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = path.read_bytes()[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: this is no UTF-8 text: save it as that") from e
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    entries = [_parse(path, i, line, task.classes) for i, line in lines]

    def read(start, stop):
        out = []
        for line, image, label in entries[start:stop]:
            try:
                out.append(((found.path / image).read_bytes(), (label,)))
            except OSError as e:
                raise UserError(
                    f"{path}:{line}: cannot read {found.path / image} ({e.strerror or e}): put "
                    f"the image there, or correct that line"
                ) from e
        return out

    key = {"folder": _absolute(found.path), "list": hashlib.sha256(text.encode()).hexdigest()}
    key |= {"stamps": _stamps(found.path, entries)}
    where = lambda i: f"{path}:{entries[i][0]}: {entries[i][1]}"
    return Split(len(entries), (task.name,), read, key, where)


def _stamps(folder, entries):
    """One hash over size and time of every listed image; one that is missing is reported when read."""
    digest = hashlib.sha256()
    for _, image, _ in entries:
        path = folder / image
        digest.update(repr(stamp(path) if path.exists() else None).encode())
    return digest.hexdigest()


def _parse(path, number, line, classes):
    """`(line number, image, label)` of a line of a list file."""
    parts = line.split()
    if len(parts) != 2 or not parts[1].removeprefix("-").isdecimal():
        raise UserError(
            f"{path}:{number}: {line.strip()!r} is not an image path and a whole number: "
            f"correct that line"
        )
    image, label = pathlib.PurePosixPath(parts[0]), int(parts[1])
    if image.is_absolute() or ".." in image.parts or "\\" in parts[0] or "\0" in parts[0]:
        raise UserError(f"{path}:{number}: {parts[0]!r} leads out of {path.parent}: correct that line")
    if not 0 <= label < classes:
        raise UserError(
            f"{path}:{number}: label {label} is not one of the {classes} classes 0 to {classes - 1}: "
            f"correct that line"
        )
    return number, image, label


_BUNDLED, _VTAB = Source(_find_bundled, _open_bundled), Source(_find_vtab, open_vtab)


def _source(task):
    return task.source or (_BUNDLED if task.group == "bundled" else _VTAB)
