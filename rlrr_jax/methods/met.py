"""MET: adapters of their own for each early exit (Liu et al., 2024, arXiv 2409.13999).

Not all of it is public. This is the plainest reading, ours: a pair of projections is shared by all
blocks and both places, one diagonal for each exit, block and place stands between them, and an image
that leaves at an exit has passed the first blocks with that exit's. So the exits share no computation,
where with any other method an exit is a prefix of the next. The adapters follow the LayerNorms, as
those of ARC, and fold into the weights of each exit.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.methods import base

FORMULA = "W' = (I + A diag(s_exit) B) W, b' = b + c_exit W; A, B shared by all blocks and exits"
DEFAULTS = dict(lr=1e-2, weight_decay=0.0, drop_path=0.1)  # as ARC; not tuned here


def method(bottleneck: int = 50, where: str = "attention+mlp") -> base.Method:
    """MET as a `Method`; of the diagonals of an exit those of later blocks are not used.

    Args:
      bottleneck: r, columns of A [D, r] and rows of B [r, D].
      where: "attention", "mlp" or both, joined by "+".

    Raises UserError for other values.
    """
    base.positive("option bottleneck", bottleneck)
    names = base.names_in(where, base.AFTER_NORM, "place of method 'met'")

    def init(key: jax.Array, frozen: Any) -> dict:
        depth, width = base.one_width(frozen)
        if "exits" not in frozen["head"]:
            raise UserError("it needs exits, such as config.model.exits=(3,6,9)")
        number = frozen["head"]["exits"]["bias"].shape[0] + 1
        bound = math.sqrt(6 / (width + bottleneck))  # Xavier-uniform
        first, second = jax.random.split(key)
        places = {
            place: {
                "scale": jnp.zeros((number, depth, bottleneck)),
                "shift": jnp.zeros((number, depth, width)),
            }
            for place in names
        }
        down = base.uniform(first, (width, bottleneck), bound)
        return {"down": down, "up": base.uniform(second, (bottleneck, width), bound), **places}

    def merge_exit(frozen: Any, adapter: Any, number: int) -> Any:
        for place in names:
            node = jax.tree.map(lambda x: x[number], adapter[place])
            down = adapter["down"][None] * node["scale"][:, None]  # [L, D, r]
            frozen = base.prepend(frozen, place, down, adapter["up"][None], node["shift"])
        return frozen

    merge = lambda frozen, adapter: merge_exit(frozen, adapter, -1)
    decay = base.decay_of("down", "up", "scale", "shift")
    return base.Method(init, merge, decay, DEFAULTS, merge_exit=merge_exit)
