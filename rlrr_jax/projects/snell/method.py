"""SNELL: the change of a kernel is a difference of distances, of which the largest entries stay.

Shen et al., NeurIPS 2024; formulas after the authors' model/vision_transformer_timm.py
(ssfgunner/SNELL, commit e9d5185), those of SNELLA (2025, arXiv 2510.27359) too.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.methods import base

FORMULA = "W' = W + S |S| where |S| is large, S[i, o] = 0.1 (|P_0[i] - Q_0[o]| - |P_1[i] - Q_1[o]|)"
DEFAULTS = dict(lr=1e-3, weight_decay=0.05, drop_path=0.0)  # of its authors' CIFAR-100
SCALE = 0.1
SMALLEST = 1e-12  # a squared distance: a root has no gradient at 0


def method(rank: int = 32, sparsity: float = 0.8, softmax: bool = False) -> base.Method:
    """SNELL as a `Method`; it does not start at the identity, but moves little.

    A kernel [in, out] has vectors P of its inputs and Q of its outputs, of `rank / 2` values, twice. S
    is the difference of their two distances; entries below its quantile `sparsity` are left out in
    every step anew, and the rest multiplied by their size, without a gradient through it.

    Args:
      rank: values of each input and output; 32 is its authors' SNELL-32.
      sparsity: share of entries that are left out. The authors raise it in training, layer by layer;
        here it is the same throughout.
      softmax: SNELLA's: `alpha softmax_o(S / gamma) + beta` is added to S first, the three trained.

    Raises UserError for other values.
    """
    base.positive("option rank", rank)
    base.rate("option sparsity", sparsity)
    if rank % 2:
        raise UserError(f"option rank={rank} must be even: half of it is of each distance")
    if not isinstance(softmax, bool):
        raise UserError(f"option softmax={softmax} must be True or False")

    def init(key, frozen):
        tree, half = {}, rank // 2
        for i, (name, (depth, inputs, outputs)) in enumerate(base.sizes(frozen).items()):
            keys = jax.random.split(jax.random.fold_in(key, i))
            draw = lambda key, number, depth=depth: base.uniform(
                key, (depth, 2, number, half), half**-0.5
            )
            tree[name] = {"inputs": draw(keys[0], inputs), "outputs": draw(keys[1], outputs)}
            if softmax:
                starts = {"alpha": 1.0, "beta": 0.0, "gamma": 1.0}
                tree[name] |= {key: jnp.full(depth, x, jnp.float32) for key, x in starts.items()}
        return tree

    def merge(frozen, adapter):
        change = lambda name, kernel, bias: (kernel + _sparse(_dense(adapter[name]), sparsity), bias)
        return base.change_dense(frozen, base.DENSE, change)

    return base.Method(init, merge, base.decay_of("inputs", "outputs"), DEFAULTS)


def _dense(node: Any) -> jax.Array:
    """S of every block, [L, in, out]."""
    apart = _distances(node["inputs"], node["outputs"])
    change = SCALE * (apart[:, 0] - apart[:, 1])
    if "alpha" not in node:
        return change
    alpha, beta, gamma = (node[key][:, None, None] for key in ("alpha", "beta", "gamma"))
    return change + alpha * jax.nn.softmax(change / gamma, -1) + beta


def _distances(left: jax.Array, right: jax.Array) -> jax.Array:
    """Distances [L, 2, in, out] of vectors [L, 2, in, n] and [L, 2, out, n]."""
    squares = lambda x: (x**2).sum(-1)
    products = base.dot(left, right.swapaxes(-1, -2))
    apart = squares(left)[..., None] + squares(right)[..., None, :] - 2 * products
    return jnp.sqrt(jnp.maximum(apart, SMALLEST))


def _sparse(change: jax.Array, sparsity: float) -> jax.Array:
    """The entries of each block above the quantile of their sizes, times their size."""
    size = jax.lax.stop_gradient(jnp.abs(change))
    return change * jnp.where(size > quantile(size, sparsity), size, 0)


def quantile(sizes: jax.Array, share: float) -> jax.Array:
    """`jnp.quantile` of each block, [L, 1, 1], without sorting, which takes long on a CPU.

    Args:
      sizes: float32 values of at least 0, [L, in, out].
      share: the quantile, from 0 to 1.
    """
    place = share * (sizes[0].size - 1)
    k = min(int(place), sizes[0].size - 2)
    bits = jax.lax.bitcast_convert_type(sizes, jnp.int32)  # ordered as their values
    count = lambda below: below.sum((1, 2), keepdims=True)

    def set_bit(i, found):  # the largest number that at most k values are below is value k of all
        higher = found | (1 << (30 - i))
        return jnp.where(count(bits < higher) <= k, higher, found)

    low = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros((len(sizes), 1, 1), jnp.int32))
    above = jnp.where(bits > low, bits, jnp.iinfo(jnp.int32).max).min((1, 2), keepdims=True)
    high = jnp.where(count(bits <= low) > k + 1, low, above)
    low, high = (jax.lax.bitcast_convert_type(x, jnp.float32) for x in (low, high))
    return low * (1 - (place - k)) + high * (place - k)
