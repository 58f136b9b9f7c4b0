"""Linear probe: only the head is trained."""

from typing import Any

import jax

from rlrr_jax.methods.base import Method, decay_of

FORMULA = "W' = W"
DEFAULTS = dict(lr=1e-2, weight_decay=5e-5, drop_path=0.0)  # not tuned on VTAB-1k


def method() -> Method:
    """The linear probe as a `Method`."""
    return Method(init, merge, decay_of(), DEFAULTS, untouched=lambda depth: depth + 1)


def init(key: jax.Array, frozen: Any) -> dict:
    """Nothing: the head is no method's business."""
    del key, frozen
    return {}


def merge(frozen: Any, adapter: Any) -> Any:
    """The frozen tree."""
    del adapter
    return frozen
