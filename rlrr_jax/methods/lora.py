"""LoRA: a product of low rank is added to some kernels (Hu et al., ICLR 2022)."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.methods import base

FORMULA = "W' = W + (alpha / r) A B"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.0)  # not tuned on VTAB-1k


def method(
    rank: int = 8,
    alpha: float | None = None,
    targets: str = "query+value",
    rank_dropout: float = 0.0,
    rank_scale: float | None = None,
) -> base.Method:
    """LoRA as a `Method`; no dropout of its input, which could not be folded.

    Args:
      rank: r of A [in, r] and B [r, out].
      alpha: None is the rank, so that the product is not scaled.
      targets: Dense layers, joined by "+": query, key, value, out, Dense_0, Dense_1.
      rank_dropout: probability that a rank of a layer is left out of a training step (MLAE).
      rank_scale: start of a factor that is trained for each rank (MLAE's lambda); None has none. MLAE
        (Wang et al., 2024, arXiv 2405.18897) is this with `rank_dropout`.

    Raises UserError for other values.
    """
    base.positive("option rank", rank)
    names = base.names_in(targets, base.DENSE, "target of method 'lora'")
    base.number("option alpha", 0 if alpha is None else alpha)
    base.rate("option rank_dropout", rank_dropout)
    base.number("option rank_scale", 1 if rank_scale is None else rank_scale)
    if rank_scale == 0:
        raise UserError("option rank_scale=0 would leave every rank at 0: start it elsewhere")
    scale = 1.0 if alpha is None else alpha / rank

    def drop(key, adapter):
        keys = dict(zip(adapter, jax.random.split(key, len(adapter))))
        ranks = lambda name: base.dropped_ranks(keys[name], adapter[name]["down"], rank_dropout)
        return {name: {**node, "down": ranks(name)} for name, node in adapter.items()}

    def change(adapter):
        return lambda name, kernel, bias: (kernel + scale * product(adapter[name]), bias)

    def init(key, frozen):
        tree = factors(key, frozen, names, rank)
        if rank_scale is None:
            return tree
        start = lambda node: jnp.full((len(node["down"]), rank), rank_scale, jnp.float32)
        return {name: {**node, "scale": start(node)} for name, node in tree.items()}

    return base.Method(
        init,
        lambda frozen, adapter: base.change_dense(frozen, names, change(adapter)),
        base.decay_of("down", "up"),
        DEFAULTS,
        drop if rank_dropout else None,
    )


def factors(key: jax.Array, frozen: Any, targets: Iterable[str], rank: int) -> dict:
    """`{name: {"down" [L, in, r], "up" [L, r, out]}}`: A is U(+-1 / sqrt(in)), B is zero."""
    tree = {}
    for i, (name, (depth, inputs, outputs)) in enumerate(base.sizes(frozen, targets).items()):
        shape, bound = (depth, inputs, rank), 1 / math.sqrt(inputs)
        down = base.uniform(jax.random.fold_in(key, i), shape, bound)
        tree[name] = {"down": down, "up": jnp.zeros((depth, rank, outputs))}
    return tree


def product(node: Any) -> jax.Array:
    """A B of every block, [L, in, out]; A diag(scale) B where ranks have a scale [L, r]."""
    down = node["down"] * node["scale"][:, None] if "scale" in node else node["down"]
    return base.dot(down, node["up"])
