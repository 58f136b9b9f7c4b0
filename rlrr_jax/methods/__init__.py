"""Fine-tuning methods, each a pair of functions on parameter trees in a file of its own.

To add one: write `methods/<name>.py` with `FORMULA`, `DEFAULTS` and a function `method(**options) ->
Method`, and put the module into `METHODS`. `python -m rlrr_jax.methods` lists them all.
"""

import inspect
from typing import Any

from rlrr_jax.errors import unknown
from rlrr_jax.methods import (
    apla,
    arc,
    bitfit,
    difffit,
    dora,
    fact,
    full,
    glora,
    gps,
    hta,
    last,
    linear,
    lora,
    met,
    moppa,
    norm,
    oft,
    pissa,
    repadapter,
    rlrr,
    ssf,
    vera,
)
from rlrr_jax.methods.base import (
    Method,
    check,
    decay,
    exit_trees,
    head_count,
    merge,
    start,
    trainable_count,
)

METHODS = {
    "rlrr": rlrr,
    "linear": linear,
    "full": full,
    "bitfit": bitfit,
    "norm": norm,
    "last": last,
    "ssf": ssf,
    "lora": lora,
    "dora": dora,
    "vera": vera,
    "fact": fact,
    "arc": arc,
    "repadapter": repadapter,
    "apla": apla,
    "hta": hta,
    "glora": glora,
    "difffit": difffit,
    "oft": oft,
    "pissa": pissa,
    "gps": gps,
}

# Nothing takes these unless they are named: an activation method, which folds into no weight, and one
# that needs early exits.
SPECIAL = {"moppa": moppa, "met": met}

__all__ = ["METHODS", "SPECIAL", "Method", "check", "decay", "exit_trees", "get", "head_count", "merge"]
__all__ += ["module", "options", "start", "trainable_count"]


def module(name: str) -> Any:
    """The file of a method, with its `FORMULA` and `DEFAULTS`; UserError for an unknown name."""
    known = METHODS | SPECIAL
    if name not in known:
        raise unknown("method", name, known)
    return known[name]


def get(name: str, **kwargs: Any) -> Method:
    """The `Method` of that name with its options.

    Raises UserError for an unknown name, option or value, with the nearest known one.
    """
    known = module(name)
    for key in kwargs:
        if key not in options(name):
            raise unknown(f"option of method {name!r}", key, options(name))
    return known.method(**kwargs)


def options(name: str) -> dict[str, Any]:
    """A method's options and their defaults."""
    return {k: p.default for k, p in inspect.signature(module(name).method).parameters.items()}
