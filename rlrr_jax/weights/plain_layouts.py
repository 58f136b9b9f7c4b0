"""Arrays of a network of one's own: named by their path in its tree, `a/b/kernel` or `a.b.kernel`."""

import re
from typing import Any

from flax.traverse_util import flatten_dict

STEM = None  # pixels are not folded: the network takes what it was trained on
UNUSED = re.compile(r"(?!)")  # no array: each of the file must be one of the network's


def read(flat: dict) -> dict:
    """A file's arrays by the names of the tree, without the `params/` of a checkpoint."""
    return {re.sub(r"^params/", "", key.replace(".", "/")): value for key, value in flat.items()}


def numbered(params: Any) -> dict:
    """The flat dict of a tree; nothing is stacked here."""
    return flatten_dict(params, sep="/")


def stacked(flat: dict) -> dict:
    """What `numbered` undoes: nothing."""
    return flat
