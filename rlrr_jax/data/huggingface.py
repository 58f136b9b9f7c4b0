"""Datasets of Hugging Face's library `datasets` on this disk: image folders, parquet, Arrow."""

import io
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from rlrr_jax.data import labels
from rlrr_jax.data.examples import SPLITS, Example, Files, pictures, some
from rlrr_jax.data.task import stamp
from rlrr_jax.errors import UserError, first_line


def read(folder: pathlib.Path) -> tuple[Files, list[Example], str]:
    """The images of a dataset, how their bytes are reached, and the kind of their labels.

    A sequence of classes, or of texts, is several labels of an image.

    Args:
      folder: what `datasets.load_dataset` or `save_to_disk` knows as a dataset.

    Raises UserError without the library, for a folder that is no dataset, or one without images or
    labels.
    """
    parts = _open(folder)
    if unknown := sorted(parts.keys() - SPLITS.keys()):
        raise UserError(f"{folder} has a split {unknown[0]!r}, none of train, val and test: rename it")
    rows: dict[str, tuple[Any, int]] = {}  # key of an example -> its part, and its row there
    parts = {s: _encoded(part, *_columns(folder, part.features)) for s, part in parts.items()}
    on_disk = any(False in _paths(part)[1] for part in parts.values())
    _check_all(folder, sum(map(len, parts.values())), on_disk)
    out, tables = [], []
    for split, part in parts.items():
        name, several = _namer(part.features["label"])
        for row, (value, path, inside) in enumerate(zip(part["label"], *_paths(part))):
            if value is None or value == -1:
                raise UserError(f"{folder}: image {row} of {split} has no label: give it one")
            if several and any(x is None or x == -1 for x in value):
                raise UserError(f"{folder}: image {row} of {split} has an empty label: remove it")
            label = labels.joined(map(name, value)) if several else name(value)
            if several and any(labels.SEPARATOR in name(x) for x in value):
                raise UserError(f"{folder} has the label {label!r}: give labels names without ;")
            key = _key(folder, path, inside, f"{split}/{label}")
            key = key if key and key not in rows else f"{split}/{row}"
            rows[key] = part, row
            out.append(Example(key, label, SPLITS[split]))
        tables += [stamp(table["filename"]) for table in part.cache_files]
    return _files(folder, rows, tables), out, "labels" if several else "class"


def _namer(feature: Any) -> tuple[Callable[[Any], str], bool]:
    """A function from a label to its name, and whether an image has a sequence of them."""
    inner = getattr(feature, "feature", None)
    return getattr(inner if inner is not None else feature, "int2str", str), inner is not None


def _check_all(folder: pathlib.Path, number: int, on_disk: bool) -> None:
    """UserError if a folder of images has more than the library found, by words in their names."""
    there = len(pictures(folder)[0])
    if on_disk and there > number:
        raise UserError(
            f"hf:{folder} would leave out {there - number} of {there} images, since Hugging Face's "
            f"library takes train and test in names of files for splits: give the folder without hf:"
        )


def _open(folder: pathlib.Path) -> dict[str, Any]:
    """Split -> `datasets.Dataset`."""
    try:
        import datasets
    except ImportError as e:
        raise UserError("hf:FOLDER needs Hugging Face's library datasets: install the extra hf") from e
    _check_data_files(folder)
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder))
    except Exception as e:  # of many kinds: files that are damaged, columns that differ
        raise UserError(
            f"Hugging Face's library datasets cannot read {folder} ({first_line(e)}): correct it"
        ) from e
    return dict(found) if isinstance(found, dict) else {"train": found}


def _check_data_files(folder: pathlib.Path) -> None:
    """UserError if the library would take files from elsewhere than the folder, as its card says."""
    import yaml  # which datasets needs, too

    said = {}
    card = folder / "README.md"
    if card.exists():
        head = re.match(r"(?s)\s*---\s*\n(.*?)\n---", card.read_text(errors="replace"))
        said["README.md"] = head[1] if head else ""
    if (folder / ".huggingface.yaml").exists():
        said[".huggingface.yaml"] = (folder / ".huggingface.yaml").read_text(errors="replace")
    for name, text in said.items():
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise UserError(f"{folder / name} has a head that is no YAML: correct or remove it") from e
        for place in _data_files(values):
            parts = pathlib.PurePosixPath(place)
            if re.search(r"://|::|\\|\0", place) or parts.is_absolute() or ".." in parts.parts:
                raise UserError(
                    f"{folder / name} names data at {place!r}, which is not in the folder and not "
                    f"fetched: remove that"
                )


def _data_files(node: Any, inside: bool = False) -> Iterator[str]:
    """The paths that a card's head gives as `data_files` or `data_dir`."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _data_files(value, inside or key in ("data_files", "data_dir"))
    elif isinstance(node, list):
        for value in node:
            yield from _data_files(value, inside)
    elif inside and isinstance(node, str):
        yield node


def _columns(folder: pathlib.Path, features: Any) -> tuple[str, str]:
    """Names of the columns of images and of labels; UserError where they are not plain."""
    import datasets

    kinds = {name: getattr(feature, "dtype", "") for name, feature in features.items()}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    of_classes = lambda feature: isinstance(feature, datasets.ClassLabel)
    inner = {name: getattr(feature, "feature", None) for name, feature in features.items()}
    classes = [n for n, feature in features.items() if of_classes(feature) or of_classes(inner[n])]
    texts = ("string", "large_string")
    plain = [name for name in ("label", "labels") if getattr(inner.get(name), "dtype", "") in texts]
    plain += ["label"] if kinds.get("label") in (*texts, "int32", "int64") else []
    classes = ["label"] if "label" in (*classes, *plain) else classes or plain
    for what, found in (("images", images), ("classes", classes)):
        if len(found) != 1:
            number = some(found) or "none"
            way = "give the folder without hf:" if pictures(folder)[0] else "cast or remove columns"
            raise UserError(
                f"{folder} must have one column of {what}, and has {number} among "
                f"{', '.join(features)}: {way}"
            )
    return images[0], classes[0]


def _encoded(part: Any, image: str, label: str) -> Any:
    """A dataset of the columns `image`, bytes or paths that are not decoded, and `label`."""
    import datasets

    part = part.select_columns([image, label])
    part = part.rename_columns({a: b for a, b in ((image, "image"), (label, "label")) if a != b})
    return part.cast_column("image", datasets.Image(decode=False)).with_format(None)


def _paths(part: Any) -> tuple[list[str | None], list[bool]]:
    """The paths of the images, and whether their bytes are in the table."""
    import pyarrow.compute

    column = part.data.column("image")
    inside = pyarrow.compute.struct_field(column, "bytes").is_valid().to_pylist()
    return pyarrow.compute.struct_field(column, "path").to_pylist(), inside


def _key(folder: pathlib.Path, path: str | None, inside: bool, place: str) -> str | None:
    """The path that an image has, or would have, in a plain folder, so that it is divided alike.

    Args:
      folder: where the dataset is.
      path: path of the image, or its name alone if its bytes are in a table.
      inside: whether they are.
      place: split and class.
    """
    if not path:
        return None
    if inside:
        return f"{place}/{pathlib.PurePath(path).name}"
    try:
        return pathlib.Path(path).relative_to(os.path.abspath(folder)).as_posix()
    except ValueError:
        return path


def _files(folder: pathlib.Path, rows: dict[str, tuple[Any, int]], tables: list) -> Files:
    """How the bytes are reached: in a file of their own, or in a row of a table on disk."""

    def open(example: Example) -> BinaryIO:
        part, row = rows[example.path]
        image = part[row]["image"]
        return io.BytesIO(image["bytes"]) if image["bytes"] else pathlib.Path(image["path"]).open("rb")

    def size(example: Example) -> int:
        with open(example) as file:
            return file.seek(0, os.SEEK_END)

    return Files(folder, open, size, lambda example: [size(example), *tables])
