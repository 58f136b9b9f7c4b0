"""Random masks for dropout, cheap enough for every value of every layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def threefry2x32(key: Any, counter: Any) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), the cipher of `jax.random`.

    Written out, so that XLA fuses it: on CPUs JAX loops over its rounds instead, which made drop path
    cost half as much as all of a ViT-B/16 training step beside it.

    Args:
      key, counter: two uint32 arrays each, broadcastable.

    Returns two uint32 arrays.
    """
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y
            y = x ^ ((y << distance) | (y >> (32 - distance)))
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y


def keep(key: jax.Array, rate: Any, shape: tuple) -> jax.Array:
    """Bools of a shape [..., n], False with a probability of `rate`, to the nearest 2^-16.

    Each block of the cipher makes four values. `rate` may be traced.
    """
    quarter = (*shape[:-1], -(-shape[-1] // 4))
    size = math.prod(quarter)
    index = jnp.arange(size, dtype=jnp.uint32).reshape(quarter)
    words = threefry2x32(jax.random.key_data(key)[:2], (index, jnp.uint32(0)))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    least = jnp.round(rate * 65536).astype(jnp.uint32)
    return jnp.concatenate([half >= least for half in halves], -1)[..., : shape[-1]]


def drop_path_masks(
    keys: jax.Array, rates: jax.Array, shape: tuple, mode: str, first: int = 0
) -> jax.Array:
    """Which values of the residual branches are kept, [L, 2, B, T, D] or [L, 2, B, 1, 1], bool.

    Args:
      keys: one PRNG key per example, [B]; so the noise does not depend on how a batch is split.
      rates: probability of a drop in each of the L blocks, may be traced.
      shape: (T, D) of a branch.
      mode: "element" drops single values (the RLRR authors' code), "sample" the whole branch of an
        example (stochastic depth, Huang et al., 2016).
      first: number of the first of these blocks in the network.
    """
    shape = shape if mode == "element" else (1, 1)

    def kept(block, rate, branch, key):
        return keep(jax.random.fold_in(key, 1 + 2 * block + branch), rate, shape)

    for axes in ((None, None, None, 0), (None, None, 0, None), (0, 0, None, None)):
        kept = jax.vmap(kept, axes)
    return kept(first + jnp.arange(len(rates)), rates, jnp.arange(2), keys)


def drop_path(x: jax.Array, rate: Any, keep: jax.Array) -> jax.Array:
    """Drops parts of a residual branch `x` [B, T, D] and rescales the rest by `1 / (1 - rate)`."""
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), 0)
