"""Fine-tuning methods, each a pair of functions on parameter trees in a file of its own.

To add one: write a file with `FORMULA`, `DEFAULTS` and a function `method(**options) -> Method`, and
name it by its path, `method=<file>:method`. `python -m rlrr_jax.methods` lists ours.
"""

import inspect
from collections.abc import Callable
from typing import Any

from rlrr_jax import lookup
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.methods.base import (
    Method,
    Training,
    asks_training,
    decay,
    head_count,
    merge,
    start,
    trainable_count,
    trained,
)
from rlrr_jax.methods.contract import check

METHODS = tuple(lookup.NAMES["method"])  # ours, which all fold into the weights

__all__ = [
    "METHODS",
    "Method",
    "Training",
    "asks_training",
    "check",
    "decay",
    "find",
    "formula",
    "get",
    "head_count",
]
__all__ += ["merge", "options", "start", "trainable_count", "trained"]


def find(name: str) -> Callable[..., Method]:
    """The function `(**options) -> Method` of a name; UserError for an unknown one."""
    return lookup.find("method", name)


def formula(name: str) -> str:
    """What a method computes, in a line: `FORMULA` of its file."""
    return getattr(inspect.getmodule(find(name)), "FORMULA", name)


def get(name: str, **kwargs: Any) -> Method:
    """The `Method` of that name with its options.

    Raises UserError for an unknown name, option or value, with the nearest known one.
    """
    function, known = find(name), options(name)
    for key in kwargs:
        if key not in known:
            raise unknown(f"option of method {name!r}", key, known)
    method = function(**kwargs)
    if not isinstance(method, Method):
        raise UserError(f"method {name!r} must return a methods.Method, not {type(method).__name__}")
    return method


def options(name: str) -> dict[str, Any]:
    """A method's options and their defaults."""
    return {k: p.default for k, p in inspect.signature(find(name)).parameters.items()}
