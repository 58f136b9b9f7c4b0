"""Cheap checks of pretrained weights that were prepared to give away the images they are tuned on.

A server that sends frozen weights and gets gradients back can make the network transparent, and read
images out of the gradients of an adapter (PEFTLeak, Sami et al., CVPR 2025,
https://github.com/info-ucr/PEFTLeak): the patch embedding passes pixels on, attention and MLPs pass
tokens on, large biases choose a token. No public backbone looks like that. Weights that pass may still
be prepared in another way; an adapter's start is never read from a file.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

LARGE_BIAS = 50.0  # the attack has 1e4; public models stay far below
LARGE_WEIGHT = 100.0  # the attack has 1e5 in queries and keys
SAMPLE = 256  # outputs of a kernel that are compared with each other
PATCHES = ("embedding", "patch_embed")


def oddities(frozen: Any) -> list[str]:
    """What no public backbone has, a phrase each; empty for weights that pass.

    Args:
      frozen: a model's tree, see `reader.load`. Its head is not looked at.
    """
    arrays = {
        "/".join(path): np.asarray(x)
        for path, x in flatten_dict(frozen).items()
        if path[0] != "head" and np.ndim(x)
    }
    found: dict[str, list[str]] = {}
    for name, array in arrays.items():
        for what in dict.fromkeys(_of_array(name, array)):  # once, not for each block
            found.setdefault(what, []).append(name)
    first = lambda names: names[0] + f" and {len(names) - 1} more" * (len(names) > 1)
    return [f"{what} ({first(names)})" for what, names in found.items()]


def warning(frozen: Any) -> str:
    """What is said of weights, a model's tree, that look prepared; empty for others."""
    if not (odd := oddities(frozen)):
        return ""
    return (
        f"looks prepared to give away the images it is tuned on (PEFTLeak): {'; '.join(odd)}. If "
        f"gradients leave this machine, take weights from their authors"
    )


def _of_array(name: str, x: np.ndarray) -> Iterator[str]:
    """What is odd about an array."""
    kind, patches = name.rpartition("/")[2], name.startswith(PATCHES)
    if kind == "bias" and np.abs(x).max() > LARGE_BIAS:
        yield f"biases beyond {LARGE_BIAS:g}"
    if kind == "scale" and any(row.std() < 1e-6 < abs(row.mean() - 1) for row in _rows(name, x)):
        yield "LayerNorms that scale all channels alike, by other than 1"
    if kind != "kernel" or (x.ndim - ("encoderblock" in name) > 3 and not patches):
        return  # convolutions
    for kernel in _matrices(name, x):
        if np.abs(kernel).max() > LARGE_WEIGHT:
            yield f"weights beyond {LARGE_WEIGHT:g}"
        if patches and _orthogonal(kernel):
            yield "a patch embedding that passes pixels on as they are"
        if not patches and _identity(kernel):
            yield "layers that pass their input on as it is"
        if _duplicates(kernel) > 0.5:
            yield "most outputs of a layer with the same weights"  # real ones have some, of idle heads


def _rows(name: str, x: np.ndarray) -> np.ndarray:
    return x if "encoderblock" in name else x[None]


def _matrices(name: str, x: np.ndarray) -> Iterator[np.ndarray]:
    """Kernels [inputs, outputs] of an array, one for each block."""
    for kernel in _rows(name, x):
        if name.startswith(PATCHES):
            yield kernel.reshape(-1, kernel.shape[-1])  # [p, p, 3, D]
        elif kernel.ndim == 3 and "out" in name:
            yield kernel.reshape(-1, kernel.shape[-1])  # [heads, Dh, D]
        else:
            yield kernel.reshape(kernel.shape[0], -1)  # [D, heads, Dh], or a matrix


def _orthogonal(kernel: np.ndarray) -> bool:
    """Whether outputs see unrelated directions, as pixels or rotations of them do."""
    gram = kernel.T.astype(np.float64) @ kernel
    own = np.square(np.diag(gram)).sum()
    return bool(np.square(gram).sum() - own < 0.01 * own)


def _identity(kernel: np.ndarray) -> bool:
    """Whether more than half of a square kernel's energy lies on its diagonal."""
    if kernel.shape[0] != kernel.shape[1]:
        return False
    return bool(np.square(np.diag(kernel)).sum() > 0.5 * np.square(kernel).sum() > 0)


def _duplicates(kernel: np.ndarray) -> float:
    """Share of the outputs, of a sample, that have the direction of another."""
    columns = kernel[:, :: -(-kernel.shape[1] // SAMPLE)]
    lengths = np.linalg.norm(columns, axis=0)
    columns = columns[:, lengths > 1e-6] / lengths[lengths > 1e-6]
    cosines = columns.T @ columns
    np.fill_diagonal(cosines, 0)
    return float((cosines > 0.99).any(0).mean()) if cosines.size else 0.0
