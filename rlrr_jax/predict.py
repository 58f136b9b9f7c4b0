"""Classes of image files: `python -m rlrr_jax.predict --adapter A.safetensors IMAGES...`.

Of a model of several labels an image, those above their thresholds; of values, the value. IMAGES are
files, folders (searched through), patterns such as "x/*.png", or `-` for a list of them on standard
input. Files that are no readable image are named at the end, and the exit code is 1.
"""

import csv
import functools
import glob
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from rlrr_jax import adapters, cards, evaluate, files, metrics
from rlrr_jax.data import decoding, examples
from rlrr_jax.errors import Parser, UserError, first_line, one_sentence

FORMATS = ("table", "csv", "jsonl")


def find(names: Iterable[str], note: Callable[[str], None] = lambda text: None) -> list:
    """Paths of images, in order, each once; UserError if there is none.

    In a folder these are the files with one of `examples.ENDINGS`, in linked folders, too. Hidden files
    and folders (`._a.png`, `.ipynb_checkpoints`) are passed over.

    Args:
      names: files, folders, patterns, or "-" for a list on standard input.
      note: called with a sentence about what was passed over in a folder.
    """
    paths = []
    for name in names:
        if name == "-":
            if hasattr(sys.stdin, "reconfigure"):  # names are bytes
                sys.stdin.reconfigure(errors="surrogateescape")
            paths += [pathlib.Path(line.strip()) for line in sys.stdin if line.strip()]
            continue
        there = pathlib.Path(name).exists()  # a file may be called ~x.png
        path = pathlib.Path(name) if there else files.local(name)
        if path.is_dir():
            found, others = examples.pictures(path)
            paths += found
            for text in examples.passed_over(path, others):
                note(text)
        elif not path.exists() and glob.has_magic(name):
            matches = map(pathlib.Path, glob.glob(str(path), recursive=True))
            paths += sorted(p for p in matches if p.is_file())
        else:
            paths.append(path)
    if not paths:
        raise UserError(f"there is no image in {' '.join(names)}: give files, folders or patterns")
    return list(dict.fromkeys(paths))


def read(path: Any, pixels: Any) -> np.ndarray:
    """An image file as the model takes it, [size, size, 3] uint8; ValueError if it is none.

    Args:
      pixels: a `decoding.Pixels`; it is turned upright, and laid on white, whatever that says.
    """
    try:
        return decoding.decode(path.read_bytes(), pixels._replace(upright=True, white=True))
    except MemoryError:
        raise
    except UnidentifiedImageError as e:
        raise ValueError("it is no image") from e
    except OSError as e:
        raise ValueError(e.strerror or first_line(e)) from e
    except Exception as e:  # its decoders raise anything
        raise ValueError(first_line(e)) from e


def predict(
    tuned: adapters.Tuned,
    paths: list,
    batch_size: int = 64,
    progress: bool = False,
    classify: Callable[[Any], Any] | None = None,
) -> Iterator[tuple]:
    """Probabilities of classes or labels for image files, or their value.

    Args:
      tuned: an `adapters.Tuned` model.
      paths: image files.
      batch_size: images at once; all batches have one shape.
      progress: whether to show a bar.
      classify: function `images uint8 [b, h, w, 3], b <= batch_size -> probabilities [b or more,
        classes]`; None: those of the whole model, of which all batches have one shape, see
        `metrics.KINDS`.

    Yields:
      `(path, probabilities [classes] float32 or None, why it could not be read or None)`, in order.
    """
    run = tuned.card["config"]
    pixels = decoding.pixels_for(cards.image_size(tuned.card), run["crop"], run["crop_from"])
    one = functools.partial(_one, pixels=pixels)
    shares = metrics.KINDS[cards.answers(tuned.card)["kind"]].shares
    size = min(batch_size, len(paths))
    whole = lambda images: shares(np.asarray(tuned.logits(evaluate.pad(images, size))))
    classify = classify or whole
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), unit="img", disable=not progress) as bar,
    ):
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            decoded = list(pool.map(one, batch))
            images = [image for image, _ in decoded if image is not None]
            rows = iter(())
            if images:
                rows = iter(np.asarray(classify(np.stack(images))))
            for path, (image, why) in zip(batch, decoded):
                yield path, None if image is None else next(rows), why
            bar.update(len(batch))


def _one(path, pixels):
    try:
        return read(path, pixels), None
    except ValueError as e:
        return None, str(e)


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
    rows = [(str(p).encode("utf-8", "backslashreplace").decode(), best) for p, best in rows]
    if form == "jsonl":
        one = lambda best: {"value": best[0][1]} if kind == "value" else {_KEYS[kind]: _plain(best)}
        return "".join(json.dumps({"file": p, **one(best)}) + "\n" for p, best in rows)
    if form == "csv":
        return _csv(rows, kind)
    width = max([len(p) for p, _ in rows] + [4])
    if kind == "value":
        return "".join(f"{p:<{width}}   {best[0][1]:12.6g}\n" for p, best in rows)
    names = max([len(n) for _, best in rows for n, _ in best] + [1])
    cells = lambda best: "   ".join(f"{n:>{names}} {100 * q:6.2f} %" for n, q in best) or "none"
    return "".join(f"{p:<{width}}   {cells(best)}\n" for p, best in rows)


_KEYS = {"class": "top", "labels": "labels"}


def _plain(best):
    return [{"class": n, "p": q} for n, q in best]


def _csv(rows, kind):
    """Rows as CSV; several labels are between semicolons, as lists of files have them."""
    text, k = io.StringIO(), max((len(best) for _, best in rows), default=0)
    writer = csv.writer(text, lineterminator="\n")
    if kind == "value":
        writer.writerow(["file", "value"])
        writer.writerows([p, best[0][1]] for p, best in rows)
    elif kind == "labels":
        writer.writerow(["file", "label", "p"])
        joined = lambda values: ";".join(map(str, values))
        writer.writerows(
            [p, joined(n for n, _ in best), joined(q for _, q in best)] for p, best in rows
        )
    else:
        writer.writerow(["file"] + [f"{what}{i + 1}" for i in range(k) for what in ("class", "p")])
        writer.writerows([p, *(x for pair in best for x in pair)] for p, best in rows)
    return text.getvalue()


def add_flags(parser: Any) -> None:
    """Adds the flags of the command."""
    parser.add_argument("images", nargs="+", metavar="IMAGES")
    parser.add_argument("--adapter", required=True, help="of a run, or made by rlrr_jax.export")
    adapters.add_flags(parser)
    parser.add_argument("--top_k", type=int, default=3)
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.add_argument("--out", help="file for the predictions; default: the screen")
    parser.add_argument("--batch_size", type=int, default=64)


def check(args: Any) -> tuple[list, adapters.Adapter]:
    """The image files and the adapter that flags name; UserError, before any work, for others."""
    if args.top_k < 1 or args.batch_size < 1:
        raise UserError("--top_k and --batch_size must be greater than 0")
    if args.out:
        files.writable(files.local(args.out))  # before the work, not after it
    path = adapters.find(args.adapter)
    paths = find(args.images, note=lambda text: print(text, file=sys.stderr, flush=True))
    return paths, adapters.read(path)


def show_all(
    args: Any, tuned: adapters.Tuned, paths: list, classify: Any = None, at_once: int | None = None
) -> None:
    """Prints or writes the classes of image files; UserError at the end for those that are none.

    Args:
      args: what the flags gave.
      tuned: the model.
      paths: image files.
      classify: as `predict` takes it.
      at_once: number of images that it gets at once; None: a batch.
    """
    rows, bad = [], []
    shown = len(paths) > args.batch_size
    found = predict(tuned, paths, at_once or args.batch_size, progress=shown, classify=classify)
    for path, probabilities, why in found:
        if probabilities is None:
            bad.append(f"  {path}: {why}".encode("utf-8", "backslashreplace").decode())
        else:
            rows.append((path, said(probabilities, tuned.card, args.top_k)))
    text = show(rows, args.format, cards.answers(tuned.card)["kind"])
    if args.out:
        files.write(files.local(args.out), text)
    else:
        print(text, end="", flush=True)
    if bad:
        print("not read:", *bad, sep="\n", file=sys.stderr)
        raise UserError(f"{len(bad)} of {len(paths)} files could not be read: see above")


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    add_flags(parser)
    args = parser.parse_args()
    paths, adapter = check(args)
    show_all(args, adapters.load(adapter, **adapters.given(args)), paths)


if __name__ == "__main__":
    one_sentence(main)
