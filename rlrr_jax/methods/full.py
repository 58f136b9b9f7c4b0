"""Full fine-tuning: every weight is trained, from the frozen tree and a zero head."""

import jax
import jax.numpy as jnp

from rlrr_jax.methods.base import Method

DEFAULTS = dict(lr=1e-4, weight_decay=5e-5, drop_path=0.1)  # not tuned on VTAB-1k


def method():
    """Full fine-tuning as a `Method`."""
    return Method(init, merge, decay, DEFAULTS)


def init(key, frozen):
    """A copy of the frozen tree; the head is zero."""
    del key
    return {**jax.tree.map(jnp.array, frozen), "head": jax.tree.map(jnp.zeros_like, frozen["head"])}


def merge(frozen, trainable):
    """The trained tree; the frozen one is not used."""
    del frozen
    return trainable


def decay(trainable):
    """Kernels only: no bias, LayerNorm, class token or position embedding."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", trainable)
