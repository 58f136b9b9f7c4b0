"""Cross-entropy, and what keeps MoPPA's router from taking one path alone."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.losses import Net, Values, cross_entropy
from rlrr_jax.projects.moppa.block import PATHS
from rlrr_jax.recipe import Batch


def moppa(net: Net, batch: Batch, balance: float = 0.01) -> Values:
    """Cross-entropy plus `balance` times the divergence of the shares of the paths from equal ones."""
    losses, values = cross_entropy(net, batch)
    return losses + balance * divergence(net.trained["adapter"]), values


def divergence(adapter: Any) -> jax.Array:
    """The Kullback-Leibler divergence of each block's shares from equal ones, summed over blocks."""
    log_shares = jax.nn.log_softmax(adapter["route"], -1)
    return (jnp.exp(log_shares) * (log_shares + math.log(len(PATHS)))).sum()
