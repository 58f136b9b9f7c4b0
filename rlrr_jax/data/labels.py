"""Labels of one's own images that are no single class: several of an image, or a value.

The images are stored with whole numbers for labels, one of each label that differs; a task's `encode`
makes of them what losses and metrics get.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from rlrr_jax.errors import UserError

SEPARATOR = ";"  # of several labels of an image
VALUE = "value"  # name of the column, and of the only output
LARGEST = 1e30  # mean and deviation of values that float32 takes with room
FARTHEST = 1e4  # mean of values, in deviations: beyond that a head in float32 loses digits


def names(label: str) -> tuple[str, ...]:
    """The labels in `"a;b"`, sorted, each once; none in an empty text."""
    each = (unicodedata.normalize("NFC", name.strip()) for name in label.split(SEPARATOR))
    return tuple(sorted({name for name in each if name}))


def joined(several: Iterable[str]) -> str:
    """`"a;b"` of labels."""
    return SEPARATOR.join(sorted(several))


class Coded(NamedTuple):
    """Labels as whole numbers.

    Attributes:
      codes: label, as an `Example` has it -> its number.
      names: names of the outputs.
      encode: see `data.task.Task`.
      unit: see `data.task.Task`.
    """

    codes: dict[str, int]
    names: tuple[str, ...]
    encode: Callable[[np.ndarray], np.ndarray] | None
    unit: tuple[float, float]


def coded(kind: str, every: Iterable[str], trained: Iterable[str], where: object) -> Coded:
    """The `Coded` labels of a task.

    Args:
      kind: of the labels, see `metrics.KINDS`.
      every: label of each image.
      trained: those of training images, whose mean and deviation are the unit of values.
      where: where the images are.

    Raises UserError for values that are all one.
    """
    labels = sorted(set(every))
    codes = {label: i for i, label in enumerate(labels)}
    if kind == "class":
        return Coded(codes, tuple(labels), None, (1.0, 0.0))
    if kind == "value":
        known = np.array([float(label) for label in trained])
        if not len(known) or not known.std():
            raise UserError(f"all training images of {where} have one value: add others")
        with np.errstate(all="ignore"):
            unit = float(known.std()), float(known.mean())
        if not math.isfinite(unit[0]) or max(unit[0], abs(unit[1])) > LARGEST:
            raise UserError(
                f"the values of {where} are too large for float32: give them in another unit"
            )
        if abs(unit[1]) > FARTHEST * unit[0]:
            raise UserError(
                f"the values of {where} differ by {unit[0]:.3g} around {unit[1]:.6g}, too little for "
                f"float32: subtract a number from all of them"
            )
        values = (np.array([float(label) for label in labels]) - unit[1]) / unit[0]
        return Coded(codes, (VALUE,), values.astype(np.float32).__getitem__, unit)
    every_name = sorted({name for label in labels for name in names(label)})
    sets = [set(names(label)) for label in labels]
    hot = [[name in mine for name in every_name] for mine in sets]
    return Coded(codes, tuple(every_name), np.array(hot, np.float32).__getitem__, (1.0, 0.0))
