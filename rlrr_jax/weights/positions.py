"""Position embeddings on another grid of patches, and patch embeddings of another size."""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors

from rlrr_jax.errors import UserError
from rlrr_jax.weights import state_dicts

# How a position embedding is brought to another grid: "linear" is SciPy's zoom, as in the public JAX
# code; "bicubic" is PyTorch's with antialiasing, as in timm; "bicubic_plain" is PyTorch's without, as
# in transformers; "bilinear" is JAX's with antialiasing, as in the code of FlexiViT.
RESIZES = ("linear", "bilinear", "bicubic", "bicubic_plain")


def place(flat: dict, target: tuple, how: Any, path: Any, note: Callable | None) -> None:
    """Brings the position embedding to `target` (rows, columns); a class-token row goes into `cls`."""
    position = flat.get("pos_embedding")
    if position is None or position.ndim != 3:
        return  # reported with the other missing and mis-shaped names
    n, width = position.shape[1:]
    tokens = [name for name in ("cls", "dist", "registers") if getattr(flat.get(name), "ndim", 0) == 3]
    rows, grid = _rows_and_grid(n, [flat[name].shape[-2] for name in tokens], how.grid)
    if grid is None:
        what = "a square" if how.grid is None else f"{how.grid[0]} x {how.grid[1]}"
        raise UserError(
            f"the position embedding in {path} has {n} rows, which is not {what}: give its shape as "
            f"config.pretrained.grid=(rows, columns)"
        )
    for name in tokens:
        number = min(rows, flat[name].shape[-2])
        if number and flat[name].shape[-1] == width:
            flat[name] = flat[name] + position[:, :number]
        position, rows = position[:, number:], rows - number
    if tuple(grid) != tuple(target):
        if note:
            note(
                f"note: the position embedding of {path} was resized from {grid[0]} x {grid[1]} to "
                f"{target[0]} x {target[1]} (pretrained.resize={how.resize})"
            )
        position = resize_position(position.reshape(*grid, width), tuple(target), how.resize)
    flat["pos_embedding"] = np.ascontiguousarray(position.reshape(1, -1, width), np.float32)


def fit_patch(flat: dict, patch: int, how: Any, path: Any, note: Callable | None) -> None:
    """Brings the patch embedding to another patch size."""
    kernel = flat.get("embedding/kernel")
    if kernel is None or kernel.ndim != 4 or kernel.shape[0] == patch:
        return
    flat["embedding/kernel"] = resize_patch(kernel, patch, how.resize)
    if note:
        note(f"note: the patch embedding of {path} was resized from {len(kernel)} to {patch} pixels")


def resize_patch(kernel: Any, patch: int, rule: str) -> np.ndarray:
    """A patch embedding [p, p, 3, D] for patches of another size (FlexiViT; Beyer et al., CVPR 2023).

    Resized patches give the outputs that the old ones gave: the kernel is multiplied by the
    pseudo-inverse of the resizing, which is linear of the JAX code, bicubic of the others.
    """
    eye = np.eye(len(kernel), dtype=np.float32)
    linear = rule in ("linear", "bilinear")
    method = dict(method="linear", antialias=False) if linear else dict(method="cubic")
    along = np.asarray(jax.image.resize(eye, (patch, len(kernel)), **method), np.float64)
    inverse = np.linalg.pinv(along.T)  # [patch, p]
    return np.einsum("ia,jb,abcd->ijcd", inverse, inverse, kernel, optimize=True).astype(np.float32)


def _rows_and_grid(n, tokens, grid):
    """How many rows of a position embedding are of tokens, and the grid of the others (None: unknown).

    Without a grid that is given the rows of patches must be a square: 16 rows are 4 x 4, never a class
    token's and 3 x 5.

    Args:
      n: number of its rows.
      tokens: numbers of tokens of each kind; all of them have rows, or the first alone, or none.
      grid: the file's, if it is given.
    """
    side = lambda x: math.isqrt(x) if x > 0 and math.isqrt(x) ** 2 == x else None
    for rows in (0, *((sum(tokens), tokens[0]) if tokens else ())):
        if grid is not None and n - rows == math.prod(grid):
            return rows, grid
        if grid is None and n > rows and side(n - rows):
            return rows, (side(n - rows),) * 2
    return 0, None


def resize_position(position: Any, target: Any, rule: str) -> np.ndarray:
    """A position embedding [h, w, D] on the grid `target` (rows, columns), by one of `RESIZES`."""
    if rule == "linear":
        zoom = (target[0] / position.shape[0], target[1] / position.shape[1], 1)
        import scipy.ndimage  # slow to import

        return scipy.ndimage.zoom(position, zoom, order=1)
    if rule in ("bicubic", "bilinear"):
        shape, method = (*target, position.shape[-1]), {"bicubic": "cubic", "bilinear": "linear"}[rule]
        return np.asarray(jax.image.resize(position, shape, method, antialias=True))
    rows, columns = (_bicubic(n, m) for n, m in zip(position.shape, target))
    return np.einsum("ih,jw,hwd->ijd", rows, columns, position, optimize=True)


@functools.cache
def _bicubic(old, new):
    """PyTorch's weights [new, old] of bicubic interpolation without antialiasing, a = -0.75.

    The four nearest of the old values, those beyond an edge are the edge's.
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(place - (first + tap))
        near = (1.25 * x - 2.25) * x * x + 1
        far = -0.75 * (((x - 5) * x + 8) * x - 4)
        np.add.at(
            weights,
            (np.arange(new), np.clip(first + tap, 0, old - 1)),
            np.where(x <= 1, near, np.where(x < 2, far, 0)),
        )
    return weights


def rule(path: pathlib.Path) -> str:
    """How a position embedding is resized by the code that a file's names belong to, see `reader`."""
    try:
        if path.name.endswith(state_dicts.INDEX):
            names = json.loads(path.read_text())["weight_map"]
        else:
            with safetensors.safe_open(path, "numpy") as file:
                names = list(file.keys())
    except Exception:  # whoever reads its arrays says what is wrong
        return "bicubic"
    stems = "embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight"
    registers = any(name.endswith("embeddings.register_tokens") for name in names)
    return (
        "bicubic_plain" if any(name.endswith(stems) for name in names) and not registers else "bicubic"
    )
