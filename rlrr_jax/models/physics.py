"""Heat, wave and Poisson operators on the grid of patches, solved by cosine transforms.

After MoPPA (Wang et al., 2024, arXiv 2412.02759), whose text and code are not all public: the spectral
forms are those of vHeat (https://github.com/MzeroMiko/vHeat), the same group's earlier operator.
Borders are Neumann's: nothing flows out.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NAME = "physics"  # of a block's values in a ViT's tree; where there are none, nothing is computed
PATHS = ("heat", "wave", "poisson")


def dct(size: int) -> np.ndarray:
    """The orthonormal DCT-II [frequencies, positions]: `dct(n) @ x`; its transpose is the inverse."""
    n, x = np.arange(size)[:, None], np.arange(size)[None]
    rows = np.cos((x + 0.5) * n * np.pi / size) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows.astype(np.float64)


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
    mask = jnp.sum(shares[:, None, None, None] * paths, 0).astype(x.dtype)
    rows, columns = (jnp.asarray(dct(size), x.dtype) for size in grid)
    spectrum = jnp.einsum("ih,jw,bhwd->bijd", rows, columns, x)
    x = jnp.einsum("ih,jw,bijd->bhwd", rows, columns, spectrum * mask[None])
    return jnp.concatenate([tokens[:, :first], x.reshape(len(x), -1, x.shape[-1])], 1)
