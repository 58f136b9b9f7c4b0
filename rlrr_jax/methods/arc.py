"""ARC: linear adapters with shared bottlenecks, rescaled in each block (Dong et al., NeurIPS 2023).

They stand between a LayerNorm and what follows, so they fold into query, key, value and Dense_0.
"""

import math

import jax
import jax.numpy as jnp

from rlrr_jax.methods import base

FORMULA = "W' = (I + A diag(s) A^T) W, b' = b + c W; A shared by all blocks"
DEFAULTS = dict(lr=1e-2, weight_decay=0.0, drop_path=0.1)  # its authors' VTAB-1k script; not tuned here


def method(bottleneck: int = 50, where: str = "attention+mlp") -> base.Method:
    """ARC as a `Method`; without the dropout of its authors' code, which could not be folded.

    Args:
      bottleneck: columns of A [D, bottleneck].
      where: "attention", "mlp" or both, joined by "+"; each has its own A.

    Raises UserError for other values.
    """
    base.positive("option bottleneck", bottleneck)
    names = base.names_in(where, base.AFTER_NORM, "place of method 'arc'")

    def init(key, frozen):
        depth, width = base.one_width(frozen)
        bound = math.sqrt(6 / (width + bottleneck))  # Xavier-uniform
        tree = {
            place: {
                "down": base.uniform(jax.random.fold_in(key, i), (width, bottleneck), bound),
                "scale": jnp.zeros((depth, bottleneck)),
                "shift": jnp.zeros((depth, width)),
            }
            for i, place in enumerate(names)
        }
        return tree

    def merge(frozen, adapter):
        for place in names:
            node = adapter[place]
            down = node["down"][None] * node["scale"][:, None]  # [L, D, bottleneck]
            frozen = base.prepend(frozen, place, down, node["down"].T[None], node["shift"])
        return frozen

    return base.Method(init, merge, base.decay_of("down", "scale", "shift"), DEFAULTS)
