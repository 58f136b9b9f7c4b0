"""The images of a split in k parts, of which a run is trained on all but one: cross-validation."""

import re
from typing import Any, NamedTuple

import numpy as np


class Fold(NamedTuple):
    """Part `number`, from 0, of `of` parts of the split `whole`; not `inside`, all other parts."""

    whole: str
    number: int
    of: int
    inside: bool

    def __str__(self) -> str:
        return f"{self.whole}, {'' if self.inside else 'not '}fold {self.number + 1}/{self.of}"

    def size(self, total: int) -> int:
        """Number of images, of `total` in the split."""
        mine = len(range(self.number, total, self.of))
        return mine if self.inside else total - mine


def names(whole: str, number: int, of: int) -> tuple[str, str]:
    """The names of the splits to train on and to choose on; every `Task` knows their sizes."""
    return str(Fold(whole, number, of, False)), str(Fold(whole, number, of, True))


def parse(split: str) -> Fold | None:
    """The fold that a split's name says; None for a split that is whole."""
    found = re.fullmatch(r"(.+), (not )?fold (\d+)/(\d+)", split)
    return found and Fold(found[1], int(found[3]) - 1, int(found[4]), not found[2])


def pick(fold: Fold, labels: np.ndarray) -> np.ndarray:
    """Indices of a fold's images in its split, in their order.

    Images are dealt out one by one, in the order of their labels [N], so that each part has its share
    of each class, or of small and large values; those with several labels [N, C] as they come.
    """
    order = np.argsort(labels, kind="stable") if labels.ndim == 1 else np.arange(len(labels))
    mine = np.zeros(len(labels), bool)
    mine[order[fold.number :: fold.of]] = True
    return np.flatnonzero(mine == fold.inside)


class Picked:
    """Some images of a split; a slice of them is read when it is wanted."""

    def __init__(self, images: Any, which: np.ndarray) -> None:
        self.images, self.which = images, which
        self.shape, self.dtype = (len(which), *images.shape[1:]), images.dtype

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: Any) -> np.ndarray:
        which = self.which[index]
        rank = np.argsort(which)  # files are read forwards
        out = np.empty((len(which), *self.shape[1:]), self.dtype)
        out[rank] = self.images[which[rank]]
        return out
