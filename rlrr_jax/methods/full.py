"""Full fine-tuning: every weight is trained, from the frozen tree on."""

from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.methods.base import Method, decay_of

FORMULA = "W' = anything, b' = anything"
DEFAULTS = dict(lr=1e-4, weight_decay=5e-5, drop_path=0.1)  # not tuned on VTAB-1k


def method() -> Method:
    """Full fine-tuning as a `Method`; kernels decay, nothing else."""
    return Method(init, merge, decay_of("kernel"), DEFAULTS)


def init(key: jax.Array, frozen: Any) -> dict:
    """A copy of the frozen tree without its head."""
    del key
    return {name: jax.tree.map(jnp.array, node) for name, node in frozen.items() if name != "head"}


def merge(frozen: Any, adapter: Any) -> Any:
    """The trained tree, with the frozen one's head."""
    return {**frozen, **adapter}
