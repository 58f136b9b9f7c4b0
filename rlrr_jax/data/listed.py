"""Labelled images in folders of classes, and in lists of files."""

import collections
import csv
import io
import math
import pathlib
import re
import unicodedata

from rlrr_jax.data.examples import ENDINGS, JUNK, SPLITS, Example, kinds, passed_over, pictures, some
from rlrr_jax.data.labels import SEPARATOR, VALUE, joined
from rlrr_jax.data.labels import names as labels_of
from rlrr_jax.errors import UserError


def innermost(folder: pathlib.Path) -> pathlib.Path:
    """The folder below through which all others are reached, itself if it has several or none."""
    while len(folders(folder)) == 1:
        (folder,) = folders(folder)
    return folder


_SPLIT_WORD = re.compile(r"(?i)(^|[^a-z])(training|train|testing|test|validation|valid|val)([^a-z]|$)")


def _check_layout(folder, inner):
    """UserError for folders whose names are those of splits with more around, such as training_set."""
    like = [p for p in inner if p.name.lower() not in SPLITS and _SPLIT_WORD.search(p.name)]
    if len(like) < 2:
        return
    below = [{q.name for q in folders(innermost(p))} for p in like]
    if below[0] and all(below) and len(set.intersection(*below)) > 1:
        names = " and ".join(p.name for p in like)
        raise UserError(
            f"{folder} has the folders {names}, which look like splits with the same classes in each: "
            f"rename them to train and test, or give one of them"
        )


def read_folder(folder: pathlib.Path) -> tuple[list[Example], list[str]]:
    """Examples and notes of an image folder; UserError if there is no image in a class folder."""
    found: list[Example] = []
    others: collections.Counter = collections.Counter()
    inner = folders(folder)
    named = {p: SPLITS[p.name.lower()] for p in inner if p.name.lower() in SPLITS}
    _check_layout(folder, inner)
    # A folder of that name without folders in it is a class: vehicles are boats and trains.
    divided = any(split == "train" and folders(p) for p, split in named.items())
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
    notes = _offolders(folder, list(named) if divided else [folder], found)
    if divided and (left := [p.name for p in inner if p not in named]):
        notes.append(f"note: folders beside {folder}/train are passed over: {some(left)}")
    return found, notes + passed_over(folder, others)


def folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder, but for hidden ones and those of systems."""
    named = lambda p: not p.name.startswith(".") and p.name not in JUNK
    return [p for p in sorted(folder.iterdir()) if named(p) and p.is_dir()]


def _offolders(folder, tops, found):
    """Notes on class folders without images, and on images that lie deeper."""
    paths = [pathlib.PurePath(e.path) for e in found]
    tops = [top.relative_to(folder) for top in tops]
    filled = {
        top / path.relative_to(top).parts[0] for path in paths for top in tops if top in path.parents
    }
    every = [p.relative_to(folder) for top in tops for p in folders(folder / top)]
    notes = []
    if empty := [p.as_posix() for p in every if p not in filled]:
        notes.append(f"note: no image is in {some(empty)}")
    deeper = sorted({path.parent.as_posix() for path in paths if path.parent not in filled})
    if deeper:
        notes.append(f"note: images of {some(deeper)} have the class of the folder above")
    return notes


def read_list(path: pathlib.Path) -> tuple[list[Example], str, list[str]]:
    """Examples, the kind of their labels and notes of a list: CSV or TSV with a header, or bare lines.

    Several labels are in a column `labels`, or between semicolons in `label`, or in columns of 0 and 1;
    values in a column `value`.
    """
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
    lines, kind = list(enumerate(text.splitlines(), 1)), "class"
    if "path" in head and len(head) > 1:
        if twice := [name for name, number in collections.Counter(head).items() if number > 1]:
            raise UserError(f"{path} has two columns {twice[0]!r}: remove or rename one")
        rows = [(i, row) for i, row in _rows(path, text, tab) if any(c.strip() for c in row)]
        names = next(csv.reader([first], delimiter=tab))  # labels keep their case
        out, kind = _labelled(path, [name.strip() for name in names], rows)
    elif path.suffix.lower() in (".csv", ".tsv"):
        raise UserError(f"{path} has the header {first!r}: name its columns path,label[,split]")
    else:
        out = [_bare(path, i, line) for i, line in lines if line.strip()]
    if not out:
        raise UserError(f"there is no image in {path}: add lines")
    labels: dict[str, Example] = {}
    for e in out:
        if (other := labels.setdefault(e.path, e)).label != e.label:
            way = "keep one" if kind == "value" else "keep one, or write both in one line as a;b"
            raise UserError(f"{path}: {e.path} has the labels {other.label!r} and {e.label!r}: {way}")
    notes = []
    if kind == "labels":
        alone = sum(SEPARATOR not in e.label for e in out)
        notes.append(f"note: images have several labels; {alone} of {len(out)} have one or none")
    if len(twice := set(out)) < len(out):
        notes.append(f"note: {len(out) - len(twice)} lines of {path} are there twice, and count once")
    return list(dict.fromkeys(out)), kind, notes


def _labelled(path, head, rows):
    """Examples of lines with columns, and the kind of their labels: by the names of the columns."""
    lower, known = [name.lower() for name in head], ("path", "label", "labels", "value", "split")
    given = [name for name in ("label", "labels", VALUE) if name in lower][:1]
    others = [name for name in head if name.lower() not in known]
    if not given:
        return _hot(path, head, others, rows), "labels"
    found = [_row(path, number, lower, row, given[0]) for number, row in rows]
    if given[0] == VALUE:
        return [e._replace(label=_number(path, i, e.label)) for e, (i, _) in zip(found, rows)], "value"
    several = given[0] == "labels" or any(SEPARATOR in e.label for e in found)
    if several:
        found = [e._replace(label=joined(labels_of(e.label))) for e in found]
    return found, "labels" if several else "class"


def _hot(path, head, others, rows):
    """Examples of lines whose columns are labels, each 0 or 1."""
    if not others:
        raise UserError(f"{path} has no column of labels: name one label, labels or value")
    if bad := [name for name in others if not name or SEPARATOR in name]:
        raise UserError(f"{path} has a label called {bad[0]!r}: give it a name without {SEPARATOR}")
    lower, out = [name.lower() for name in head], []
    for number, row in rows:
        e = _row(path, number, lower, row, None)
        cells = {name: cell.strip() for name, cell in zip(head, row)}
        for name in others:
            if cells[name] not in ("0", "1"):
                raise UserError(
                    f"{path}:{number}: column {name!r} has {cells[name]!r}, neither 0 nor 1: correct "
                    f"it, or name the column of labels label"
                )
        out.append(e._replace(label=joined(name for name in others if cells[name] == "1")))
    return out


def _number(path, line, text):
    """A value as Python writes it."""
    try:
        value = float(text)
    except ValueError as e:
        raise UserError(f"{path}:{line}: the value {text!r} is no number: correct it") from e
    if not math.isfinite(value):
        raise UserError(f"{path}:{line}: the value {text!r} is not finite: correct it")
    return repr(value)


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


def _row(path, number, head, row, column):
    """The example of a line with columns; its label is in one of them, or not yet known."""
    if len(row) != len(head):
        way = "quote what has a separator in it" if len(row) > len(head) else "add what is missing"
        raise UserError(f"{path}:{number}: {len(row)} columns instead of {len(head)}: {way}")
    values = {name: cell.strip() for name, cell in zip(head, row)}
    split = values.get("split") or None
    if split and split.lower() not in SPLITS:
        raise UserError(f"{path}:{number}: split {split!r} is none of train, val and test: correct it")
    label = values[column] if column else ""
    if not values["path"] or (not label and column in ("label", VALUE)):
        way = " (or call the column labels, if an image may have none)" if column == "label" else ""
        what = "label" if column != VALUE else VALUE
        raise UserError(
            f"{path}:{number}: a path or {what} is empty: fill it in, or remove the line{way}"
        )
    label = unicodedata.normalize("NFC", label)
    return Example(values["path"], label, split and SPLITS[split.lower()])


def _bare(path, number, line):
    """The example of a line `path label`; the label is what follows the last space."""
    match = re.fullmatch(r"\s*(.*\S)\s+(\S+)\s*", line)
    if not match:
        raise UserError(f"{path}:{number}: {line.strip()!r} is no path and label: correct that line")
    return Example(match[1], unicodedata.normalize("NFC", match[2]))
