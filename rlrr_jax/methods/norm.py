"""LayerNorm tuning: only scale and bias of every LayerNorm are trained (Zhao et al., ICLR 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax.methods.base import Method, decay_of

FORMULA = "W' = W, b' = b; scale and bias of each LayerNorm anything"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.0)  # not tuned on VTAB-1k


def method() -> Method:
    """LayerNorm tuning as a `Method`."""
    return Method(init, merge, decay_of(), DEFAULTS)


def init(key: jax.Array, frozen: Any) -> dict:
    """A copy of every LayerNorm."""
    del key
    is_norm = lambda path: any("norm" in part.lower() for part in path)
    norms = {k: jnp.array(v) for k, v in flatten_dict(frozen).items() if is_norm(k)}
    return unflatten_dict(norms)


def merge(frozen: Any, adapter: Any) -> Any:
    """The frozen tree with the trained LayerNorms."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(adapter)})
