"""DoRA: LoRA for the direction of each kernel column, a length beside it (Liu et al., ICML 2024)."""

import jax
import jax.numpy as jnp

from rlrr_jax.methods import base, lora

FORMULA = "W' = m * V / |V|, V = W + (alpha / r) A B, |V| the norm of each output's column"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.0)  # not tuned on VTAB-1k


def method(rank: int = 8, alpha: float | None = None, targets: str = "query+value") -> base.Method:
    """DoRA as a `Method`. As its authors advise, the norm |V| gets no gradient (section 4.3).

    Args and errors: see `lora.method`.
    """
    base.positive("option rank", rank)
    names = base.names_in(targets, base.DENSE, "target of method 'dora'")
    base.number("option alpha", 0 if alpha is None else alpha)
    scale = 1.0 if alpha is None else alpha / rank

    def init(key, frozen):
        tree = lora.factors(key, frozen, names, rank)
        for name, site in base.dense(frozen, names).items():
            kernel, _ = base.weights(frozen, site)
            tree[name]["magnitude"] = jnp.linalg.norm(kernel, axis=1)  # [L, out]
        return tree

    def merge(frozen, adapter):
        def change(name, kernel, bias):
            direction = kernel + scale * lora.product(adapter[name])
            norm = jax.lax.stop_gradient(jnp.linalg.norm(direction, axis=1))
            return base.columns(direction, adapter[name]["magnitude"] / norm), bias

        return base.change_dense(frozen, names, change)

    return base.Method(init, merge, base.decay_of("down", "up"), DEFAULTS)
