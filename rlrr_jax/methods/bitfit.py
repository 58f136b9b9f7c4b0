"""BitFit: only biases are trained (Ben Zaken et al., ACL 2022)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax.methods.base import Method, decay_of

FORMULA = "W' = W, b' = anything"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.0)  # not tuned on VTAB-1k


def method() -> Method:
    """BitFit as a `Method`: the biases of the patch embedding, every Dense and every LayerNorm."""
    return Method(init, merge, decay_of(), DEFAULTS)


def init(key: jax.Array, frozen: Any) -> dict:
    """A copy of every bias but the head's."""
    del key
    ours = lambda path: path[-1] == "bias" and path[0] != "head"
    return unflatten_dict({k: jnp.array(v) for k, v in flatten_dict(frozen).items() if ours(k)})


def merge(frozen: Any, adapter: Any) -> Any:
    """The frozen tree with the trained biases."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(adapter)})
