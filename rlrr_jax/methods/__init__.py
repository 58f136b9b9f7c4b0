"""Fine-tuning methods, each a pair of functions on parameter trees.

To add one: write `methods/<name>.py` with a function `method(**options) -> Method` and put it in
`METHODS`. See `rlrr.py`.
"""

import difflib
import inspect

from rlrr_jax.methods import full, linear, rlrr
from rlrr_jax.methods.base import Method, head_count, trainable_count

METHODS = {"rlrr": rlrr.method, "linear": linear.method, "full": full.method}

__all__ = ["METHODS", "Method", "get", "head_count", "options", "trainable_count"]


def get(name, **kwargs):
    """The `Method` of that name with its options.

    Raises ValueError for an unknown name, option or value, with the nearest known one.
    """
    if name not in METHODS:
        raise ValueError(_unknown("method", name, METHODS))
    for key in kwargs:
        if key not in options(name):
            raise ValueError(_unknown(f"option of method {name!r}", key, options(name)))
    return METHODS[name](**kwargs)


def options(name):
    """A method's options and their defaults."""
    return {k: p.default for k, p in inspect.signature(METHODS[name]).parameters.items()}


def _unknown(kind, name, known):
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? Known" if near else "known"
    return f"unknown {kind} {str(name)!r}: {hint}: {', '.join(known) or 'none'}"
