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
    norm,
    oft,
    pissa,
    repadapter,
    rlrr,
    ssf,
    vera,
)
from rlrr_jax.methods.base import Method, check, decay, head_count, merge, start, trainable_count

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

__all__ = ["METHODS", "Method", "check", "decay", "get", "head_count", "merge", "options", "start"]
__all__ += ["trainable_count"]


def get(name: str, **kwargs: Any) -> Method:
    """The `Method` of that name with its options.

    Raises UserError for an unknown name, option or value, with the nearest known one.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    for key in kwargs:
        if key not in options(name):
            raise unknown(f"option of method {name!r}", key, options(name))
    return METHODS[name].method(**kwargs)


def options(name: str) -> dict[str, Any]:
    """A method's options and their defaults."""
    return {k: p.default for k, p in inspect.signature(METHODS[name].method).parameters.items()}
