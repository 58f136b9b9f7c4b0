"""LayerNorm tuning: only scale and bias of every LayerNorm are trained (Zhao et al., ICLR 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax.methods.base import Method, decay_of, sites, subtree

FORMULA = "W' = W, b' = b; scale and bias of each LayerNorm anything"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.0)  # not tuned on VTAB-1k


def method() -> Method:
    """LayerNorm tuning as a `Method`."""
    return Method(init, merge, decay_of(), DEFAULTS)


def init(key: jax.Array, frozen: Any) -> dict:
    """A copy of every LayerNorm."""
    del key
    paths = [site.path for site in sites(frozen) if site.role.endswith("norm")]
    return unflatten_dict({path: jax.tree.map(jnp.array, subtree(frozen, path)) for path in paths})


def merge(frozen: Any, adapter: Any) -> Any:
    """The frozen tree with the trained LayerNorms."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(adapter)})
