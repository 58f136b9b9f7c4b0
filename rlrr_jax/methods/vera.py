"""VeRA: LoRA whose factors are random, frozen and shared; two vectors are trained beside them.

(Kopiczko et al., ICLR 2024.)
"""

import math

import jax
import jax.numpy as jnp

from rlrr_jax.methods import base

FORMULA = "W' = W + A diag(d) B diag(b), A and B random, the same in every block"
DEFAULTS = dict(lr=1e-2, weight_decay=0.0, drop_path=0.0)  # not tuned on VTAB-1k


def method(rank: int = 256, targets: str = "query+value", projection_seed: int = 0) -> base.Method:
    """VeRA as a `Method`.

    Args:
      rank: r of A [in, r] and B [r, out], Kaiming-uniform.
      targets: see `lora.method`.
      projection_seed: seed of A and B, which are made anew from it instead of being stored.

    Raises UserError for other values.
    """
    base.positive("option rank", rank)
    base.seed("option projection_seed", projection_seed)
    names = base.names_in(targets, base.DENSE, "target of method 'vera'")

    def init(key, frozen):
        del key
        tree = {
            name: {"d": jnp.full((depth, rank), 0.1), "b": jnp.zeros((depth, outputs))}
            for name, (depth, _, outputs) in base.sizes(frozen, names).items()
        }
        return tree

    def merge(frozen, adapter):
        shapes = base.sizes(frozen, names).values()
        down, up = projections(projection_seed, *(max(s[i] for s in shapes) for i in (1, 2)), rank)

        def change(name, kernel, bias):
            (_, inputs, outputs), node = kernel.shape, adapter[name]
            scaled = up[None, :, :outputs] * node["b"][:, None]  # [L, r, out]
            return kernel + base.dot(down[None, :inputs] * node["d"][:, None], scaled), bias

        return base.change_dense(frozen, names, change)

    return base.Method(init, merge, base.decay_of("d", "b"), DEFAULTS)


def projections(seed: int, inputs: int, outputs: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """A [in, r] and B [r, out] of the largest kernel; smaller ones use their first rows and columns."""
    down, up = jax.random.split(jax.random.key(seed))
    down = base.uniform(down, (inputs, rank), math.sqrt(6 / inputs))
    return down, base.uniform(up, (rank, outputs), math.sqrt(6 / rank))
