"""OFT: kernels are turned by block-diagonal rotations of their inputs (Qiu et al., NeurIPS 2023).

arXiv 2306.07280. Each block is orthogonal by the Cayley transform of a skew-symmetric matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax.errors import UserError
from rlrr_jax.methods import base

FORMULA = "W' = R W, R = diag(R_1, ..., R_n), R_i = (I + Q_i) (I - Q_i)^-1, Q_i skew-symmetric"
DEFAULTS = dict(lr=1e-3, weight_decay=0.0, drop_path=0.1)  # not tuned on VTAB-1k


def method(block: int = 8, targets: str = "+".join(base.DENSE)) -> base.Method:
    """OFT as a `Method`; it starts at the identity, and does not change the bias.

    Args:
      block: side of the blocks R_i; must divide the inputs of every target.
      targets: Dense layers, joined by "+".

    Raises UserError for other values.
    """
    base.positive("option block", block)
    names = base.names_in(targets, base.DENSE, "target of method 'oft'")

    def init(key, frozen):
        del key
        out = {}
        for name, (depth, inputs, _) in base.sizes(frozen, names).items():
            if inputs % block:
                raise UserError(f"option block={block} does not divide the {inputs} inputs of {name}")
            out[name] = jnp.zeros((depth, inputs // block, block * (block - 1) // 2))
        return out

    def merge(frozen, adapter):
        def change(name, kernel, bias):
            depth, inputs, outputs = kernel.shape
            turned = base.dot(
                rotations(adapter[name], block), kernel.reshape(depth, -1, block, outputs)
            )
            return turned.reshape(depth, inputs, outputs), bias

        return base.change_dense(frozen, names, change)

    return base.Method(init, merge, base.decay_of(), DEFAULTS)


def rotations(values: Any, block: int) -> jax.Array:
    """Orthogonal matrices [..., block, block] of the values above their diagonals."""
    upper = np.triu_indices(block, 1)
    q = (
        jnp.zeros((*values.shape[:-1], block, block), values.dtype)
        .at[..., upper[0], upper[1]]
        .set(values)
    )
    q = q - q.swapaxes(-1, -2)
    identity = jnp.broadcast_to(jnp.eye(block, dtype=q.dtype), q.shape)
    return jnp.linalg.solve(identity - q, identity + q)  # the two factors commute
