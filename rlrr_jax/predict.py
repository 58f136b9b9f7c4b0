"""Classes of image files: `python -m rlrr_jax.predict --adapter A.safetensors IMAGES...`.

Of a model of several labels an image, those above their thresholds; of values, the value. IMAGES are
files, folders (searched through), patterns such as "x/*.png", or `-` for a list of them on standard
input. Files that are no readable image are named at the end, and the exit code is 1.
"""

import functools
import glob
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
from rlrr_jax.results import predictions


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
    for path, (found,), why in several([tuned], paths, batch_size, progress, classify):
        yield path, found, why


def several(
    models: list[adapters.Tuned],
    paths: list,
    batch_size: int = 64,
    progress: bool = False,
    classify: Callable[[Any], Any] | None = None,
) -> Iterator[tuple]:
    """As `predict`, of several models: each image is read once; yields a list of what each says.

    Models that take the same pixels share the decoded image.
    """
    size = min(batch_size, len(paths))
    each = [classify or _whole(tuned, size) for tuned in models]
    pixels = [_pixels(tuned) for tuned in models]
    one = functools.partial(_one, every=list(dict.fromkeys(pixels)))
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), unit="img", disable=not progress) as bar,
    ):
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            decoded = list(pool.map(one, batch))
            good = [images for images, _ in decoded if images]
            rows = [iter(())] * len(models)
            if good:
                arrays = {how: np.stack([images[how] for images in good]) for how in good[0]}
                rows = [iter(np.asarray(f(arrays[how]))) for f, how in zip(each, pixels)]
            for path, (images, why) in zip(batch, decoded):
                yield path, [next(row) if images else None for row in rows], why
            bar.update(len(batch))


def _pixels(tuned):
    run = tuned.card["config"]
    return decoding.pixels_for(cards.image_size(tuned.card), run["crop"], run["crop_from"])


def _whole(tuned, size):
    """A function from images to the shares that a whole model gives, in batches of one size."""
    shares = metrics.KINDS[cards.answers(tuned.card)["kind"]].shares
    return lambda images: shares(np.asarray(tuned.logits(evaluate.pad(images, size))))


def _one(path, every):
    """An image as each of several `Pixels`, or why it cannot be read."""
    try:
        return {pixels: read(path, pixels) for pixels in every}, None
    except ValueError as e:
        return None, str(e)


def add_flags(parser: Any) -> None:
    """Adds the flags of the command."""
    parser.add_argument("images", nargs="*", metavar="IMAGES")
    which = "of a run, or made by rlrr_jax.export; several: each says what it sees"
    parser.add_argument("--adapter", required=True, nargs="+", metavar="ADAPTER", help=which)
    adapters.add_flags(parser)
    parser.add_argument("--top_k", type=int, default=3)
    parser.add_argument("--format", choices=predictions.FORMATS, default="table")
    parser.add_argument("--out", help="file for the predictions; default: the screen")
    parser.add_argument("--batch_size", type=int, default=64)


def check(args: Any) -> tuple[list, list[adapters.Adapter]]:
    """The image files and the adapters that flags name; UserError, before any work, for others."""
    if args.top_k < 1 or args.batch_size < 1:
        raise UserError("--top_k and --batch_size must be greater than 0")
    if args.out:
        files.writable(files.local(args.out))  # before the work, not after it
    names, images = _divided(args.adapter, args.images)
    if not images:
        raise UserError("no images are named: give files, folders or patterns behind the adapter")
    places = [adapters.find(name) for name in names]
    paths = find(images, note=lambda text: print(text, file=sys.stderr))
    read = [adapters.read(path) for path in places]
    kinds = {cards.answers(adapter.card)["kind"] for adapter in read}
    if args.format == "csv" and len(kinds) > 1:
        raise UserError(
            f"adapters of {' and '.join(sorted(kinds))} have other columns: take --format jsonl, or "
            f"one at a time"
        )
    return paths, read


def _divided(words: list[str], images: list[str]) -> tuple[list[str], list[str]]:
    """Adapters and images: what follows `--adapter` are adapters as long as it looks like them."""

    def is_adapter(word: str) -> bool:
        path = files.local(word)
        folders = ("adapter.safetensors", "*/*/seed*/adapter.safetensors", "seed*/adapter.safetensors")
        inside = path.is_dir() and any(any(path.glob(name)) for name in folders)
        return word.startswith("hf:") or word.endswith(".safetensors") or inside

    last = next((i for i, word in enumerate(words) if i and not is_adapter(word)), len(words))
    return words[:last], words[last:] + images


def show_all(
    args: Any,
    models: list[adapters.Tuned],
    paths: list,
    classify: Any = None,
    at_once: int | None = None,
) -> None:
    """Prints or writes what models say of image files; UserError at the end for those that are none.

    Args:
      args: what the flags gave.
      models: the models, of which each has its line.
      paths: image files.
      classify: as `predict` takes it.
      at_once: number of images that it gets at once; None: a batch.
    """
    rows: list[list] = [[] for _ in models]
    bad, shown = [], len(paths) > args.batch_size
    size = at_once or args.batch_size
    for path, found, why in several(models, paths, size, progress=shown, classify=classify):
        if why is not None:
            bad.append(f"  {path}: {why}".encode("utf-8", "backslashreplace").decode())
            continue
        for lines, tuned, shares in zip(rows, models, found):
            lines.append((path, predictions.said(shares, tuned.card, args.top_k)))
    kinds = [cards.answers(tuned.card)["kind"] for tuned in models]
    names = predictions.called(models, args.adapter[: len(models)])
    if len(models) == 1:
        text = predictions.show(rows[0], args.format, kinds[0])
    else:
        text = predictions.woven(rows, names, args.format, kinds)
    if args.out:
        files.write(files.local(args.out), text)
    else:
        print(text, end="")
    if bad:
        print("not read:", *bad, sep="\n", file=sys.stderr)
        raise UserError(f"{len(bad)} of {len(paths)} files could not be read: see above")


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    add_flags(parser)
    args = parser.parse_args()
    paths, read = check(args)
    models: list[adapters.Tuned] = []
    shared: list[adapters.Backbone] = []
    for adapter in read:  # those of one backbone share it
        on = next((x for x in shared if adapters.fits(adapter, x)), None)
        if on is None:
            on = adapters.backbone(adapter, **adapters.given(args))
            shared.append(on)
        models.append(adapters.load(adapter, on))
    show_all(args, models, paths)


if __name__ == "__main__":
    one_sentence(main)
