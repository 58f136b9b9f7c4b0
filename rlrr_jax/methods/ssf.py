"""SSF: the output of every operation is scaled and shifted (Lian et al., NeurIPS 2022)."""

from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from rlrr_jax.methods.base import Method, affine, decay_of, replaced, sites, subtree

FORMULA = "W' = W * s_out, b' = b * s_out + f; LayerNorms and patch embedding, too"
DEFAULTS = dict(lr=5e-3, weight_decay=5e-5, drop_path=0.0)  # of most of its authors' VTAB-1k scripts


def method() -> Method:
    """SSF as a `Method`. As in its authors' code nothing of it decays."""
    return Method(init, merge, decay_of(), DEFAULTS)


def init(key: jax.Array, frozen: Any) -> dict:
    """Scales, N(1, 0.02^2), and shifts, N(0, 0.02^2), of `_paths`. Not quite the identity."""
    tree: dict = {}
    for i, path in enumerate(_paths(frozen)):
        node = subtree(frozen, path)
        shape = (
            node["bias"].shape if "bias" in node else (len(node["kernel"]), *node["kernel"].shape[2:])
        )
        scale, shift = 0.02 * jax.random.normal(jax.random.fold_in(key, i), (2, *shape))
        tree |= {(*path, "scale"): 1 + scale}
        tree |= {(*path, "shift"): shift} if "bias" in node else {}
    return unflatten_dict(tree)


def merge(frozen: Any, adapter: Any) -> Any:
    """Folds scales and shifts into kernels (of LayerNorms: scales) and biases."""
    params = frozen
    for path in _paths(frozen):
        params = replaced(params, path, affine(subtree(frozen, path), **subtree(adapter, path)))
    return params


def _paths(frozen: Any) -> list[tuple[str, ...]]:
    """All layers with a bias, but none of a MAP head, and of a Swin's merging the LayerNorm alone.

    The latter is as in its authors' code. Of attention's, those without a bias are scaled.
    """
    left_out, heads = ("merge", "pool", "pool_norm", "position"), ("query", "key", "value")
    every = [site for site in sites(frozen) if site.role not in left_out]
    return [site.path for site in every if site.bias or site.role in heads]
