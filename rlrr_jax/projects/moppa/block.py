"""A block whose patches are mixed by heat, wave and Poisson operators before attention.

After MoPPA (Wang et al., 2024, arXiv 2412.02759), whose text and code are not all public: the spectral
forms are those of vHeat (https://github.com/MzeroMiko/vHeat), the same group's earlier operator.
Borders are Neumann's: nothing flows out, so that a cosine transform solves each equation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.fft import dctn, idctn

from rlrr_jax.models import vit

NAME = "physics"  # of a block's values in a ViT's tree; where there are none, nothing is computed
PATHS = ("heat", "wave", "poisson")


class Block(vit.Block):
    """A ViT's block that looks for the values of the operators beside its weights."""

    def before_attention(self, y):
        """The tokens, those of patches mixed over the grid."""
        if not self.has_variable("params", NAME):
            return y
        return before_attention(self.get_variable("params", NAME), y, self.grid)


def eigenvalues(grid: tuple[int, int]) -> np.ndarray:
    """Eigenvalues of the negative Laplacian at each pair of frequencies [h, w]."""
    rows, columns = (np.square(np.arange(size) * np.pi / size) for size in grid)
    return rows[:, None] + columns[None]


def multipliers(values: Any, grid: tuple[int, int]) -> dict[str, jax.Array]:
    """What each operator multiplies a spectrum by, [h, w, D].

    Args:
      values: of a block: `k`, `c`, `t`, `f`, one for each channel [D]; `k` and `t` before softplus.
      grid: rows and columns of patches.

    With the solution u at time t of each equation, X at time 0 and frequency q: u_t = k Lu gives
    exp(-k q t); u_tt = c^2 Lu, at rest at first, cos(c sqrt(q) t). The Poisson path is X + u with
    Lu = f (X - its mean), so 1 - f / q; at q = 0 all three leave the mean as it is.
    """
    q = jnp.asarray(eigenvalues(grid), values["k"].dtype)[..., None]
    k, t, c, f = (values[name][None, None] for name in "ktcf")  # [1, 1, D]
    k, t = jax.nn.softplus(k), jax.nn.softplus(t)
    inverse = jnp.where(q > 0, 1 / jnp.where(q > 0, q, 1), 0)
    return {
        "heat": jnp.exp(-k * q * t),
        "wave": jnp.cos(c * jnp.sqrt(q) * t),
        "poisson": 1 - f * inverse,
    }


def routes(values: Any) -> jax.Array:
    """The share [..., 3] of each of `PATHS`."""
    return jax.nn.softmax(values["route"], -1)


def before_attention(values: Any, tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Tokens [B, T, D], those of patches mixed over the grid; tokens before them pass.

    Args:
      values: of a block, see `multipliers`, and `route` [3].
      tokens: tokens [B, T, D], of which the last are those of the patches, row by row.
      grid: rows and columns of patches.
    """
    first = tokens.shape[1] - grid[0] * grid[1]
    x = tokens[:, first:].reshape(len(tokens), *grid, -1)
    shares, each = routes(values), multipliers(values, grid)
    paths = jnp.stack([each[path] for path in PATHS])
    mask = jnp.sum(shares[:, None, None, None] * paths, 0)
    how = dict(axes=(1, 2), norm="ortho")
    high = jnp.promote_types(x.dtype, jnp.float32)
    mixed = idctn(dctn(x.astype(high), **how) * mask[None], **how).astype(x.dtype)
    return jnp.concatenate([tokens[:, :first], mixed.reshape(len(x), -1, x.shape[-1])], 1)
