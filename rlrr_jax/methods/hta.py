"""HTA: adaptation matrices built from Householder-like reflections (Dong et al., NeurIPS 2024)."""

import math

import jax
import jax.numpy as jnp

from rlrr_jax.methods import base

FORMULA = "W' = W + A B + (I - u u^T) diag(d) (I - v v^T)"
DEFAULTS = dict(lr=5e-3, weight_decay=1e-3, drop_path=0.1)  # from its authors' grid; not tuned here


def method(rank: int = 1, targets: str = "query+key+value+out") -> base.Method:
    """HTA as a `Method`, beside square kernels.

    The paper does not say how it starts. Here A is U(+-1 / sqrt(in)), B and d are 0, so that merging
    changes nothing, and u and v are random of squared length 2: proper reflections, which training is
    free to leave.

    Args:
      rank: rank of A B; 0 leaves it out.
      targets: layers, of query, key, value and out, joined by "+".

    Raises UserError for other values.
    """
    if rank != 0:
        base.positive("option rank", rank)
    names = base.names_in(targets, ("query", "key", "value", "out"), "target of method 'hta'")

    def init(key, frozen):
        tree = {}
        for i, (name, (depth, width, _)) in enumerate(base.sizes(frozen, names).items()):
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            down = base.uniform(keys[0], (depth, width, rank), 1 / math.sqrt(width))
            tree[name] = {
                "u": _reflector(keys[1], depth, width),
                "v": _reflector(keys[2], depth, width),
            }
            tree[name] |= {"d": jnp.zeros((depth, width))}
            tree[name] |= {"down": down, "up": jnp.zeros((depth, rank, width))} if rank else {}
        return tree

    def merge(frozen, adapter):
        def change(name, kernel, bias):
            node = adapter[name]
            new = kernel + jax.vmap(_reflected)(node["u"], node["d"], node["v"])
            return new + (base.dot(node["down"], node["up"]) if rank else 0), bias

        return base.change_dense(frozen, names, change)

    return base.Method(init, merge, base.decay_of("u", "v", "d", "down", "up"), DEFAULTS)


def _reflector(key, depth, width):
    x = jax.random.normal(key, (depth, width))
    return x * math.sqrt(2) / jnp.linalg.norm(x, axis=1, keepdims=True)


def _reflected(u, d, v):
    """(I - u u^T) diag(d) (I - v v^T), [D] each, without a product of D x D matrices."""
    outer = lambda a, b: base.dot(a[:, None], b[None])
    return jnp.diag(d) - outer(u, u * d) - outer(d * v, v) + outer(u, v) * jnp.sum(u * d * v)
