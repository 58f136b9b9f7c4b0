"""Full fine-tuning: every weight is trained, from the frozen tree and a zero head."""

import jax
import jax.numpy as jnp

from rlrr_jax.methods.base import Method, decay_of, zero_head

FORMULA = "W' = anything, b' = anything"
DEFAULTS = dict(lr=1e-4, weight_decay=5e-5, drop_path=0.1)  # not tuned on VTAB-1k


def method():
    """Full fine-tuning as a `Method`; kernels decay, nothing else."""
    return Method(init, merge, decay_of("kernel"), DEFAULTS)


def init(key, frozen):
    """A copy of the frozen tree; the head is zero."""
    del key
    return {**jax.tree.map(jnp.array, frozen), "head": zero_head(frozen)}


def merge(frozen, trainable):
    """The trained tree; the frozen one is not used."""
    del frozen
    return trainable
