"""FacT: the change of all kernels is one small factorised tensor (Jie and Deng, AAAI 2023).

Query, key, value and out are one D x D slice each, the MLP's kernels as many as fit side by side:
twelve slices a block. Two factors are shared by all slices of all blocks.
"""

import math

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.methods import base

FORMULA = "W'[j] = W[j] + s U C[j] V for each D x D slice j; TK: C[j] = sum_t P[j, t] G[t]"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.1)  # its authors'; not tuned here


def method(kind: str = "tt", rank: int = 16, scale: float = 1.0) -> base.Method:
    """FacT as a `Method`; without the dropout of its authors' code, which could not be folded.

    Args:
      kind: "tt" (tensor-train) has a core C [r, r] for each slice; "tk" (Tucker) mixes r shared cores
        G [r, r, r] by P.
      rank: r of U [D, r] and V [r, D].
      scale: s, which its authors choose for each task.

    Raises UserError for other values.
    """
    base.positive("option rank", rank)
    if kind not in ("tt", "tk"):
        raise UserError(f"unknown kind {kind!r} of method 'fact': use tt or tk")
    base.number("option scale", scale)

    def merge(frozen, adapter):
        tree, slices = adapter["fact"], _slices(frozen)
        cores = (
            tree["c"] if kind == "tt" else jnp.tensordot(tree["p"], tree["g"], 1, precision="highest")
        )
        changes = base.dot(base.dot(tree["u"], cores), tree["v"]) * scale  # [L, slices, D, D]
        starts = dict(zip(slices, (sum(list(slices.values())[:i]) for i in range(len(slices)))))

        def change(name, kernel, bias):
            mine = changes[:, starts[name] : starts[name] + slices[name]]
            axis = 1 if name == "Dense_1" else 2  # side by side along the longer axis of the kernel
            return kernel + jnp.concatenate(list(mine.swapaxes(0, 1)), axis), bias

        return base.change_dense(frozen, base.DENSE, change)

    init = lambda key, frozen: {"fact": _init(key, frozen, kind, rank)}
    return base.Method(init, merge, base.decay_of("u", "v", "c", "g", "p"), DEFAULTS)


def _init(key, frozen, kind, rank):
    keys = jax.random.split(key, 3)
    depth, width = base.one_width(frozen)
    number = sum(_slices(frozen).values())
    tree = {"u": base.uniform(keys[0], (width, rank), 1 / math.sqrt(width))}
    tree["v"] = jnp.zeros((rank, width))
    if kind == "tt":
        tree["c"] = base.uniform(keys[1], (depth, number, rank, rank), 1 / math.sqrt(rank))
    else:  # Xavier-uniform
        tree["g"] = base.uniform(keys[1], (rank,) * 3, math.sqrt(6 / (2 * rank**2)))
        bound = math.sqrt(6 / (rank + depth * number))
        tree["p"] = base.uniform(keys[2], (depth, number, rank), bound)
    return tree


def _slices(frozen):
    """Number of D x D slices of each Dense: 1, 1, 1, 1, 4 and 4."""
    out = {}
    for name, (_, inputs, outputs) in base.sizes(frozen).items():
        small, large = sorted((inputs, outputs))
        if large % small:
            raise UserError(f"method 'fact' cuts {name} [{inputs}, {outputs}] into squares: none fit")
        out[name] = large // small
    return out
