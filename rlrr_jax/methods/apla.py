"""APLA: only attention's output projection is trained (Sorkhei et al., 2025)."""

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.methods import base

FORMULA = "W_out' = anything, or anything in some random columns"
DEFAULTS = dict(lr=1e-4, weight_decay=1e-5, drop_path=0.0)  # of its authors' scripts; not tuned here


def method(columns: int | None = None, column_seed: int = 0) -> base.Method:
    """APLA as a `Method`.

    Args:
      columns: how many outputs are trained, with their biases, drawn anew in each block; None: all.
      column_seed: seed of that draw, which is made anew from it instead of being stored.

    Raises UserError for other values.
    """
    if columns is not None:
        base.positive("option columns", columns)
    base.seed("option column_seed", column_seed)

    def chosen(depth, width):
        """Indices of the trained outputs, [L, columns]."""
        if columns is None or columns == width:
            return jnp.tile(jnp.arange(width), (depth, 1))
        if columns > width:
            raise UserError(f"option columns={columns} is more than the model's width {width}")
        keys = jax.random.split(jax.random.key(column_seed), depth)
        return jax.vmap(lambda key: jax.random.permutation(key, width)[:columns])(keys)

    def init(key, frozen):
        del key
        tree = {}
        for name, site in base.dense(frozen, ("out",)).items():
            kernel, bias = base.weights(frozen, site)
            index = chosen(*bias.shape)
            kernel = jnp.take_along_axis(kernel, index[:, None], 2)
            tree[name] = {"kernel": kernel, "bias": jnp.take_along_axis(bias, index, 1)}
        return tree

    def merge(frozen, adapter):
        def change(name, kernel, bias):
            new, index = adapter[name], chosen(*bias.shape)
            if new["kernel"].shape == kernel.shape:
                return new["kernel"], new["bias"]
            put = jax.vmap(lambda whole, i, part: whole.at[..., i].set(part))
            return put(kernel, index, new["kernel"]), put(bias, index, new["bias"])

        return base.change_dense(frozen, ("out",), change)

    return base.Method(init, merge, base.decay_of("kernel"), DEFAULTS)
