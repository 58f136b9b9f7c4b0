"""Linear probe: only the head is trained."""

import jax
import jax.numpy as jnp

from rlrr_jax.methods.base import Method

DEFAULTS = dict(lr=1e-2, weight_decay=5e-5, drop_path=0.0)  # not tuned on VTAB-1k


def method():
    """The linear probe as a `Method`."""
    return Method(init, merge, decay, DEFAULTS)


def init(key, frozen):
    """The head, zero."""
    del key
    return {"head": jax.tree.map(lambda x: jnp.zeros(x.shape), frozen["head"])}


def merge(frozen, trainable):
    """The frozen tree with the trained head."""
    return {**frozen, **trainable}


def decay(trainable):
    """Head kernel yes, head bias no."""
    return {"head": {"kernel": True, "bias": False}}
