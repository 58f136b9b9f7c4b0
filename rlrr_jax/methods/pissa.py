"""PiSSA: LoRA that starts at the largest singular vectors (Meng et al., NeurIPS 2024).

arXiv 2404.02948. What it starts from is kept beside it, since another machine's SVD may differ.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.methods import base

FORMULA = "W' = (W - A0 B0) + A B, A0 = U_r S_r^1/2, B0 = S_r^1/2 V_r^T, where A and B start"
DEFAULTS = dict(lr=1e-3, weight_decay=0.0, drop_path=0.0)  # not tuned on VTAB-1k


def method(rank: int = 8, targets: str = "query+value") -> base.Method:
    """PiSSA as a `Method`; it starts at the identity.

    Args:
      rank: r of A [in, r] and B [r, out].
      targets: Dense layers, joined by "+": query, key, value, out, Dense_0, Dense_1.

    Raises UserError for other values.
    """
    base.positive("option rank", rank)
    names = base.names_in(targets, base.DENSE, "target of method 'pissa'")

    def init(key, frozen):
        del key
        trained, start = {}, {}
        for name, site in base.dense(frozen, names).items():
            down, up = principal(base.weights(frozen, site)[0], rank)
            trained[name] = {"down": down, "up": up}
            start[name] = {"first_down": down, "first_up": up}
        return {**trained, base.FIXED: start}

    def merge(frozen, adapter):
        start = jax.lax.stop_gradient(adapter[base.FIXED])

        def change(name, kernel, bias):
            moved = base.dot(adapter[name]["down"], adapter[name]["up"])
            first = base.dot(start[name]["first_down"], start[name]["first_up"])
            return kernel + (moved - first), bias

        return base.change_dense(frozen, names, change)

    return base.Method(init, merge, base.decay_of("down", "up"), DEFAULTS)


def principal(kernel: Any, rank: int) -> tuple[jax.Array, jax.Array]:
    """U_r S_r^1/2 [L, in, r] and S_r^1/2 V_r^T [L, r, out] of kernels [L, in, out]."""
    u, s, v = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[:, :rank])
    return u[:, :, :rank] * root[:, None], v[:, :rank] * root[:, :, None]
