"""MoPPA: a mixture of physical priors before attention (Wang et al., 2024, arXiv 2412.02759).

An *activation* method: it folds into no weight, and a tuned model computes more than its backbone (see
`block.py`). Not all of it is public. This is the plainest reading, ours: each path starts near
the identity, the router is a softmax of three learnt values for each block and does not look at the
image, and what keeps one path from taking all is `balance` times the Kullback-Leibler divergence of
the shares from equal ones, summed over blocks (a loss of its own, `losses.py`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.methods.base import Method, decay_of, replaced, stack, subtree
from rlrr_jax.projects.moppa.block import NAME, PATHS

FORMULA = "tokens before attention: a1 heat + a2 wave + a3 Poisson of the grid; not folded"
DEFAULTS = dict(lr=5e-3, weight_decay=1e-4, drop_path=0.0, loss="moppa", block="moppa")  # ours


def method() -> Method:
    """MoPPA as a `Method`."""
    return Method(init, merge, decay_of(), DEFAULTS)


def init(key: jax.Array, frozen: Any) -> dict:
    """Values of each block [L, D], and of its router [L, 3]. Near the identity."""
    del key
    path = stack(frozen)
    if not {"embedding", "Transformer"} <= frozen.keys():
        raise UserError("it needs the grid of patches of a ViT")
    depth, width = subtree(frozen, path)["LayerNorm_0"]["scale"].shape
    start = dict(k=-5.0, t=math.log(math.e - 1), c=0.05, f=0.0)  # k = 0.007 and t = 1 after softplus
    values = {name: jnp.full((depth, width), value) for name, value in start.items()}
    return {**values, "route": jnp.zeros((depth, len(PATHS)))}


def merge(frozen: Any, adapter: Any) -> Any:
    """The frozen tree with the values of each block beside its weights."""
    path = stack(frozen)
    return replaced(frozen, path, {**subtree(frozen, path), NAME: adapter})
