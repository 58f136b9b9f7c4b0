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

from rlrr_jax.methods import base

FORMULA = "W' = (I + A diag(s_exit) B) W, b' = b + c_exit W; A, B shared by all blocks and exits"
DEFAULTS = dict(lr=1e-2, weight_decay=0.0, drop_path=0.1, loss="exits")  # as ARC; not tuned here


def method(exits: int = 3, bottleneck: int = 50, where: str = "attention+mlp") -> base.Method:
    """MET as a `Method`; of the diagonals of an exit those of later blocks are not used.

    Args:
      exits: E, the number of early exits, as many as `config.loss_kwargs.at` has.
      bottleneck: r, columns of A [D, r] and rows of B [r, D].
      where: "attention", "mlp" or both, joined by "+".

    Raises UserError for other values.
    """
    base.positive("option bottleneck", bottleneck)
    base.positive("option exits", exits)
    names = base.names_in(where, base.AFTER_NORM, "place of method 'met'")

    def init(key: jax.Array, frozen: Any) -> dict:
        depth, width = base.one_width(frozen)
        number = exits + 1
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

    merge = lambda frozen, adapter: merge_exit(frozen, adapter, -1)
    return base.Method(init, merge, base.decay_of("down", "up", "scale", "shift"), DEFAULTS)


def merge_exit(frozen: Any, adapter: Any, number: int) -> Any:
    """The tree up to an exit; the last, -1, is that of the whole network."""
    for place in sorted(base.AFTER_NORM.keys() & adapter.keys()):
        node = jax.tree.map(lambda x: x[number], adapter[place])
        down = adapter["down"][None] * node["scale"][:, None]  # [L, D, r]
        frozen = base.prepend(frozen, place, down, adapter["up"][None], node["shift"])
    return frozen


def is_met(method: base.Method) -> bool:
    """Whether a method is this one, whose exits have a tree each."""
    return method.DEFAULTS is DEFAULTS


def exits_of(adapter: Any) -> int:
    """The number of early exits of an adapter of MET's."""
    return next(len(adapter[place]["scale"]) - 1 for place in base.AFTER_NORM if place in adapter)


def trees(frozen: Any, trained: Any) -> list[dict]:
    """The plain trees up to each exit, and to the end."""
    numbers = (*range(exits_of(trained["adapter"])), -1)
    each = [merge_exit(frozen, trained["adapter"], number) for number in numbers]
    return [{**tree, "head": trained["head"]} for tree in each]
