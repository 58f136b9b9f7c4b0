"""RepAdapter: linear adapters before attention and MLP, the second half grouped.

(Luo et al., "Towards Efficient Visual Adaption via Structural Re-parameterization", 2023.) They stand
between a LayerNorm and what follows, so they fold into query, key, value and Dense_0.
"""

import math

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.methods import base

FORMULA = "W' = (I + s A B) W, b' = b + s (a B + c) W; B in groups: block-diagonal"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.1)  # its authors'; not tuned here


def method(
    hidden: int = 8, groups: int = 2, scale: float = 1.0, where: str = "attention+mlp"
) -> base.Method:
    """RepAdapter as a `Method`; without the dropout of its authors' code, which could not be folded.

    Args:
      hidden: width of A's output [D, hidden].
      groups: each group of B's outputs sees its share of the hidden values.
      scale: s, which its authors choose for each task.
      where: "attention", "mlp" or both, joined by "+".

    Raises UserError for other values.
    """
    base.positive("option hidden", hidden)
    base.positive("option groups", groups)
    if hidden % groups:
        raise UserError(f"hidden={hidden} is not divisible by groups={groups}")
    chosen = base.names_in(where, base.AFTER_NORM, "place of method 'repadapter'")
    base.number("option scale", scale)

    def init(key, frozen):
        depth, width = base.one_width(frozen)
        if width % groups:
            raise UserError(f"groups={groups} does not divide the model's width {width}")
        bound = math.sqrt(6 / (width + hidden))  # Xavier-uniform
        return {
            place: {
                "down": base.uniform(jax.random.fold_in(key, i), (depth, width, hidden), bound),
                "down_bias": jnp.zeros((depth, hidden)),
                "up": jnp.zeros((depth, groups, hidden // groups, width // groups)),
                "up_bias": jnp.zeros((depth, width)),
            }
            for i, place in enumerate(chosen)
        }

    def merge(frozen, adapter):
        for place in chosen:
            node = adapter[place]
            up = jax.vmap(lambda up: jax.scipy.linalg.block_diag(*up))(node["up"])  # [L, hidden, D]
            shift = base.dot(node["down_bias"][:, None], up)[:, 0] + node["up_bias"]
            frozen = base.prepend(frozen, place, scale * node["down"], up, scale * shift)
        return frozen

    names = ("down", "down_bias", "up", "up_bias")
    return base.Method(init, merge, base.decay_of(*names), DEFAULTS)
