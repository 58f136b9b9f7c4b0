"""What models say of image files, as text: classes, labels above their thresholds, or values."""

import csv
import io
import json
from typing import Any

import numpy as np

from rlrr_jax import cards

FORMATS = ("table", "csv", "jsonl")
_KEYS = {"class": "top", "labels": "labels"}  # of objects


def top(probabilities: Any, classes: Any, k: int) -> list:
    """The k likeliest classes: `[(name, probability), ...]`."""
    order = np.argsort(-probabilities, kind="stable")[:k]
    return [(classes[i], float(probabilities[i])) for i in order]


def said(shares: Any, card: dict, k: int) -> list:
    """What is said of an image: `[(name, share), ...]`.

    Args:
      shares: probabilities of classes or labels, or the value alone.
      card: the adapter's.
      k: number of classes; of several labels all above their thresholds are named, of values one.
    """
    how, names = cards.answers(card), card["classes"]
    if how["kind"] == "labels":
        order = np.argsort(-shares, kind="stable")
        above = (shares > np.asarray(how["thresholds"]))[order]
        return [(names[i], float(shares[i])) for i in order[above]]
    return top(shares, names, 1 if how["kind"] == "value" else k)


def show(rows: list, form: str, kind: str = "class") -> str:
    """Rows `(path, [(name, share), ...])` as text.

    Args:
      rows: of `said`.
      form: one of `FORMATS`.
      kind: of the labels, see `metrics.KINDS`.
    """
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in _objects(rows, kind))
    return _written(_cells(rows, kind)) if form == "csv" else "".join(_lines(rows, kind))


def woven(every: list[list], names: list[str], form: str, kinds: list[str]) -> str:
    """What several adapters say of the same images, image by image, with the name of each.

    Args:
      every: rows of `said` of each adapter.
      names: of the adapters.
      form: one of `FORMATS`; of CSV all adapters are of one kind.
      kinds: of the labels of each, see `metrics.KINDS`.
    """
    if form == "jsonl":
        objects = [_objects(rows, kind) for rows, kind in zip(every, kinds)]
        named = [[{"file": x["file"], "adapter": n, **x} for x in of] for of, n in zip(objects, names)]
        return "".join(json.dumps(row) + "\n" for image in zip(*named) for row in image)
    if form == "csv":
        tables = [_cells(rows, kind) for rows, kind in zip(every, kinds)]
        head, *_ = max(tables, key=lambda table: len(table[0]))
        images = zip(*(table[1:] for table in tables))
        body = [[row[0], n, *row[1:]] for image in images for row, n in zip(image, names)]
        return _written([[head[0], "adapter", *head[1:]], *body])
    width, lines = max(map(len, names)), [_lines(rows, kind) for rows, kind in zip(every, kinds)]
    return "".join(f"{n:<{width}}   {line}" for image in zip(*lines) for n, line in zip(names, image))


def _shown(path):
    return str(path).encode("utf-8", "backslashreplace").decode()


def _objects(rows, kind):
    """Rows as objects of JSON."""
    named = lambda best: [{"class": n, "p": q} for n, q in best]
    one = lambda best: {"value": best[0][1]} if kind == "value" else {_KEYS[kind]: named(best)}
    return [{"file": _shown(path), **one(best)} for path, best in rows]


def _lines(rows, kind):
    """Rows as aligned lines."""
    width = max([len(_shown(p)) for p, _ in rows] + [4])
    if kind == "value":
        return [f"{_shown(p):<{width}}   {best[0][1]:12.6g}\n" for p, best in rows]
    names = max([len(n) for _, best in rows for n, _ in best] + [1])
    cells = lambda best: "   ".join(f"{n:>{names}} {100 * q:6.2f} %" for n, q in best) or "none"
    return [f"{_shown(p):<{width}}   {cells(best)}\n" for p, best in rows]


def _cells(rows, kind):
    """Head and rows of a table; several labels are between semicolons, as lists of files have them."""
    if kind == "value":
        return [["file", "value"], *([_shown(p), best[0][1]] for p, best in rows)]
    if kind == "labels":
        joined = lambda best, i: ";".join(str(pair[i]) for pair in best)
        body = ([_shown(p), joined(best, 0), joined(best, 1)] for p, best in rows)
        return [["file", "label", "p"], *body]
    k = max((len(best) for _, best in rows), default=0)
    head = ["file"] + [f"{what}{i + 1}" for i in range(k) for what in ("class", "p")]
    return [head, *([_shown(p), *(x for pair in best for x in pair)] for p, best in rows)]


def _written(table):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()


def called(read: list, names: list[str]) -> list[str]:
    """What several adapters are called: their tasks, or where these are equal as they were named."""
    tasks = [model.card["task"] for model in read]
    return tasks if len(set(tasks)) == len(tasks) else names
