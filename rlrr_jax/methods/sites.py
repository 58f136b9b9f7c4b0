"""The layers that a method can change, found by walking a model's tree."""

import functools
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

BLOCK = ("Transformer", "encoderblock")  # all blocks, stacked: the leading axis is the depth L
DENSE = ("query", "key", "value", "out", "Dense_0", "Dense_1")  # layers of every block, in this order
_ROLES = {"Dense_0": "mlp_in", "Dense_1": "mlp_out"}
_HEADS = ("query", "key", "value")  # whose outputs are [heads, width of a head]


class Site(NamedTuple):
    """A layer: a node of the tree with a `kernel` or a `scale`.

    Attributes:
      path: keys that lead to its node.
      role: query, key, value, out, mlp_in, mlp_out, norm, embedding or dense.
      depth: L, if the layers of all blocks are stacked here, else None.
      inputs: number of inputs of one layer, heads flattened; 1 of a norm.
      outputs: number of outputs of one layer, heads flattened.
      bias: whether it has one.
    """

    path: tuple[str, ...]
    role: str
    depth: int | None
    inputs: int
    outputs: int
    bias: bool


def sites(frozen: Any) -> list[Site]:
    """All layers but the head, in the order of their paths.

    Args:
      frozen: a model's tree, of arrays or of shapes.
    """
    return list(_walk(frozen, ()))


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[Site]:
    if "kernel" in node or "scale" in node:
        yield _site(node, path)
        return
    for key in sorted(node):
        if isinstance(node[key], dict) and (path or key != "head"):
            yield from _walk(node[key], (*path, key))


def _site(node: Any, path: tuple[str, ...]) -> Site:
    name = "kernel" if "kernel" in node else "scale"
    stacked = path[: len(BLOCK)] == BLOCK
    shape = node[name].shape[1:] if stacked else node[name].shape
    outputs = math.prod(shape[1:]) if path[-1] in _HEADS else shape[-1]
    if name == "scale":
        role = "norm"
    elif path[-1] in ("embedding", *_HEADS, "out"):
        role = path[-1]
    else:
        role = _ROLES.get(path[-1], "dense")
    depth = node[name].shape[0] if stacked else None
    return Site(path, role, depth, math.prod(shape) // outputs, outputs, "bias" in node)


def dense(frozen: Any, names: Iterable[str] = DENSE) -> dict[str, Site]:
    """The Dense layers of these names in every block, in the order of `names`."""
    found = {site.path[-1]: site for site in sites(frozen) if site.depth and site.role != "norm"}
    return {name: found[name] for name in names}


def subtree(tree: Any, path: Iterable[str]) -> Any:
    """What lies at a path of keys."""
    return functools.reduce(operator.getitem, path, tree)


def replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of a tree with another value at a path of keys."""
    if not path:
        return value
    return {**tree, path[0]: replaced(tree[path[0]], path[1:], value)}
