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
