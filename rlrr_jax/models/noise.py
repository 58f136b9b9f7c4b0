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
    """Bools of a shape [..., n], False with a probability of `rate`, to the nearest 2^-16."""
    return unpacked(packed(key, rate, shape), shape[-1])


def unpacked(bits: jax.Array, number: int) -> jax.Array:
    """Bools [..., number] from the bits of bytes, see `packed`."""
    parts = [(bits >> i) & 1 for i in range(4)]
    return jnp.concatenate(parts, -1)[..., :number].astype(bool)


def packed(key: jax.Array, rate: Any, shape: tuple) -> jax.Array:
    """The bools of `keep`, as bits of bytes [..., ceil(n / 4)]: a quarter of their memory.

    Each block of the cipher makes four values, the bits of a byte; value i of n is bit i // (n / 4) of
    byte i % (n / 4). `rate` may be traced; it has as many axes as keys [K...], for [K..., *shape].
    """
    quarter = (*shape[:-1], -(-shape[-1] // 4))
    index = jnp.arange(math.prod(quarter), dtype=jnp.uint32).reshape(quarter)
    behind = lambda x: x.reshape(*x.shape, *(1,) * len(quarter))
    data = jax.random.key_data(key)
    index = index.reshape(*(1,) * key.ndim, *quarter)
    # Not by `vmap`, which would put the axes of the keys last in memory.
    words = threefry2x32((behind(data[..., 0]), behind(data[..., 1])), (index, jnp.uint32(0)))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    least = behind(jnp.round(rate * 65536).astype(jnp.uint32))
    bits = [(half >= least).astype(jnp.uint8) << i for i, half in enumerate(halves)]
    return bits[0] | bits[1] | bits[2] | bits[3]


def drop_path_masks(
    keys: jax.Array, rates: jax.Array, shape: tuple, mode: str, first: int = 0
) -> jax.Array:
    """Which values of residual branches are kept: [L, 2, B, T, ceil(D / 4)], or [L, 2, B, 1, 1] bool.

    Args:
      keys: one PRNG key per example, [B]; so the noise does not depend on how a batch is split.
      rates: probability of a drop in each of the L blocks, may be traced.
      shape: (T, D) of a branch.
      mode: "element" drops single values (the RLRR authors' code), and makes bytes, see `packed`;
        "sample" the whole branch of an example (stochastic depth, Huang et al., 2016).
      first: number of the first of these blocks in the network.
    """
    fold = lambda number, key: jax.random.fold_in(key, 1 + number)
    for axes in ((None, 0), (0, None)):
        fold = jax.vmap(fold, axes)
    numbers = 2 * first + jnp.arange(2 * len(rates))  # blocks, and in each the two branches
    each = fold(numbers, keys).reshape(len(rates), 2, len(keys))
    make, shape = (packed, shape) if mode == "element" else (keep, (1, 1))
    return make(each, rates[:, None, None], shape)


def drop_path(x: jax.Array, rate: Any, keep: jax.Array) -> jax.Array:
    """Drops parts of a residual branch `x` [B, T, D] and rescales the rest by `1 / (1 - rate)`."""
    keep = unpacked(keep, x.shape[-1]) if keep.dtype == jnp.uint8 else keep
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), 0)
