"""The layers that a method can change, found by walking a model's tree."""

import functools
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rlrr_jax.errors import UserError

STACK = "encoderblock"  # key of blocks on top of each other: the leading axis is their number L
PAIR = ("plain", "shifted")  # keys below that, where two kinds of blocks take turns
# Layers of every block, in this order; "gate" where its MLP is gated.
DENSE = ("query", "key", "value", "out", "Dense_0", "Dense_1", "gate")
HEADS = ("query", "key", "value")  # whose outputs are [heads, width of a head]
_ROLES = {
    **{name: name for name in (*HEADS, "qkv", "out", "embedding")},
    **{"Dense_0": "mlp_in", "gate": "mlp_gate", "Dense_1": "mlp_out"},
    **{"reduction": "merge", "cpb_0": "position", "cpb_1": "position"},
}
# Whose layers, norms among them, are in no block.
_PARENTS = {"patch_embed": "stem", "merge": "merge", "MAPHead_0": "pool"}
_CONV_NORMS = ("bn", "gn")  # how norms of convolutions begin


class Site(NamedTuple):
    """A layer: a node of the tree with a `kernel` or a `scale`.

    Attributes:
      path: keys that lead to its node.
      role: query, key, value, qkv (the three in one kernel), out, mlp_in, mlp_gate, mlp_out, merge (of
        patches), norm, embedding, conv, stem (where a Swin begins), pool (of a MAP head), dense
        (elsewhere), position (of what computes a position bias); stem_norm, merge_norm, pool_norm and
        conv_norm.
      depth: L, if the layers of several blocks are stacked here, else None.
      inputs: number of inputs of one layer, heads flattened; 1 of a norm.
      outputs: number of outputs of one layer, heads flattened.
      bias: whether it has one.
      third: 0, 1 or 2 of the query, key or value in a `qkv`; else None.
    """

    path: tuple[str, ...]
    role: str
    depth: int | None
    inputs: int
    outputs: int
    bias: bool
    third: int | None = None


def sites(frozen: Any) -> list[Site]:
    """All layers of a tree, of arrays or of shapes, but the head, in the order of their paths."""
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
    depth = node[name].shape[0] if STACK in path else None
    shape = node[name].shape[1:] if depth else node[name].shape
    outputs = math.prod(shape[1:]) if path[-1] in HEADS else shape[-1]
    place = next((_PARENTS[key] for key in path if key in _PARENTS), None)
    if name == "scale":
        place = "conv" if path[-1].startswith(_CONV_NORMS) else place
        role = f"{place}_norm" if place else "norm"
    else:
        role = place or _ROLES.get(path[-1], "conv" if len(shape) == 4 else "dense")
    return Site(path, role, depth, math.prod(shape) // outputs, outputs, "bias" in node)


def dense(frozen: Any, names: Iterable[str] = DENSE) -> dict[str, Site]:
    """The Dense layers of these names in every block, in the order of `names`.

    A model with one stack of blocks has one of each: `{"query": Site, ...}`. With several, the keys
    have the stack before them: `{"stage_0.plain.query": Site, ...}`.
    """
    found: dict[str, list[Site]] = {name: [] for name in DENSE}
    for site in sites(frozen):
        if site.depth and site.role == "qkv":
            for i, name in enumerate(HEADS):
                found[name].append(site._replace(outputs=site.outputs // 3, third=i))
        elif site.depth and site.path[-1] in found:
            found[site.path[-1]].append(site)
    several = len(block_numbers(frozen)) > 1
    if not any(found.values()):
        raise UserError("it changes Dense layers of Transformer blocks, which this model has not")
    if not (chosen := [(name, site) for name in names for site in found[name]]):
        raise UserError(f"it changes {'+'.join(names)}, of which this model has none")
    return {_name(site, name, several): site for name, site in chosen}


def _name(site: Site, name: str, several: bool) -> str:
    """`query`, or `stage_0.plain.query`: what its module, such as the MLP, is called says no more."""
    return ".".join([*(key for key in site.path[:-2] if key != STACK), name]) if several else name


def stack_of(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path of the stack of blocks that a layer of a block is in."""
    end = path.index(STACK) + 1
    return path[: end + (path[end] in PAIR)]


def stack(tree: Any) -> tuple[str, ...]:
    """The path of the one stack of blocks of a ViT; UserError if the model has not one."""
    found = list(block_numbers(tree))
    if len(found) != 1:
        raise UserError("it needs blocks of one width, as a ViT has")
    return found[0]


def block_numbers(tree: Any) -> dict[tuple[str, ...], list[int]]:
    """Numbers of the blocks in each stack, counted from 0 through the whole network.

    Stacks of one stage, such as plain and shifted blocks of Swin, take turns.
    """
    depths = {stack_of(site.path): site.depth for site in sites(tree) if site.depth}
    out, first = {}, 0
    for stage in dict.fromkeys(path[0] for path in depths):
        turns = [path for path in depths if path[0] == stage]
        for i, path in enumerate(turns):
            out[path] = [first + i + len(turns) * j for j in range(depths[path] or 0)]
        first += sum(depths[path] or 0 for path in turns)
    return out


def subtree(tree: Any, path: Iterable[str]) -> Any:
    """What lies at a path of keys."""
    return functools.reduce(operator.getitem, path, tree)


def replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of a tree with another value at a path of keys."""
    if not path:
        return value
    return {**tree, path[0]: replaced(tree[path[0]], path[1:], value)}
