"""Frozen weights of a ViT's blocks kept in bfloat16, or a share of them on each device.

Ordinarily a step merges the whole tree, in float32, before the first block. Here each block merges its
own inside the scan over depth, and again for the gradient, so that one block at a time is whole: a
backbone larger than a device trains (`config.frozen_dtype`, `config.shard_weights`).

A method and a model are made into others that do so; the step knows nothing of it. It needs a method
whose merge takes each block by itself. What an adapter has for all blocks together, each gets.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlrr_jax import losses, methods
from rlrr_jax.errors import UserError
from rlrr_jax.methods import Method
from rlrr_jax.methods.sites import replaced, stack, subtree
from rlrr_jax.models.matmul import DENSE
from rlrr_jax.recipe import Recipe
from rlrr_jax.runtime.mesh import SHARDED

WHOLE = "whole"  # in place of SHARDED, where every device has all


def applied(recipe: Recipe, frozen: Any, limits: Any) -> tuple[Recipe, Any]:
    """A recipe that merges block by block, and its tree; both as they were if nothing asks for it.

    Args:
      recipe: the `Recipe` of a group of trials.
      frozen: the backbone's tree, of arrays or of shapes.
      limits: the `run.Limits`, with `frozen_dtype` and `shard_weights`.

    Raises UserError for a model, a method or a loss with which it cannot be done.
    """
    if not asked(limits):
        return recipe, frozen
    path = check(recipe.method, losses.of(recipe), frozen)
    layout = _layout(frozen, path, SHARDED if limits.shard_weights else WHOLE)
    method, block = _made(recipe.method, recipe.model.block, layout)
    narrow = lambda x: _as(x, jnp.dtype(limits.frozen_dtype or jnp.float32))
    blocks = {layout.key: jax.tree.map(narrow, subtree(frozen, path))}
    how = dict(block=block, remat=False, unroll=1)  # blocks have a policy of their own, see `_made`
    recipe = recipe._replace(method=method, model=recipe.model.clone(**how))
    return recipe, replaced(frozen, path, blocks)


def check(method: Method, loss: losses.Loss, frozen: Any) -> tuple[str, ...]:
    """UserError if a method, a loss or a model is not merged block by block; where the blocks are."""
    if methods.asks_training(method):
        raise UserError(f"{_TOLD}, and this method looks at the training images: {_OUT}")
    if not loss.plain:
        raise UserError(f"{_TOLD}, and this loss may look at the whole tree: {_OUT}")
    try:
        path = stack(frozen)
    except UserError as e:
        raise UserError(f"{_TOLD}, and {e}: {_OUT}") from e
    _check_by_block(method, _layout(frozen, path, WHOLE))
    return path


def _layout(frozen: Any, path: tuple[str, ...], key: str) -> "Layout":
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), frozen)
    leaves, tree = jax.tree.flatten(shapes)
    return Layout(path, key, tuple(leaves), tree)


_TOLD = "config.frozen_dtype and shard_weights merge a block at a time"
_OUT = "leave them out"


def asked(limits: Any) -> bool:
    """Whether a run merges block by block, by its `Limits` or its configuration."""
    return limits.shard_weights or limits.frozen_dtype not in (None, "float32")


def _as(x: Any, dtype: Any) -> Any:
    """An array, on the host or not, or the shape of one, in another dtype."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype)
    return x if x.dtype == dtype else x.astype(dtype)


class Layout(NamedTuple):
    """How a tree lies.

    Attributes:
      path: where the stack of blocks is.
      key: what its leaves are under, `WHOLE` or `SHARDED`.
      leaves: shapes of the whole tree, float32.
      tree: its structure.
    """

    path: tuple[str, ...]
    key: str
    leaves: tuple
    tree: Any

    @property
    def shapes(self) -> Any:
        """The tree of shapes."""
        return jax.tree.unflatten(self.tree, self.leaves)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return jax.tree.leaves(subtree(self.shapes, self.path))[0].shape[0]

    def zeros(self) -> Any:
        """A tree of one block, all zeros: in place of what a merge does not look at."""
        one = jax.tree.map(_first, subtree(self.shapes, self.path))
        return jax.tree.map(lambda x: jnp.zeros(x.shape), replaced(self.shapes, self.path, one))


def _first(x: Any) -> Any:
    """The shape of the first of stacked arrays."""
    return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)


def stacked(method: Method, layout: Layout) -> Any:
    """Which leaves of an adapter have a row for each block; the others are for all blocks, or for none.

    Raises UserError for a method whose adapter is another one where there is one block alone.
    """
    make = functools.partial(jax.eval_shape, method.init, jax.random.key(0))
    shapes = layout.shapes
    one = replaced(shapes, layout.path, jax.tree.map(_first, subtree(shapes, layout.path)))
    try:
        every, single = make(shapes), make(one)
    except (UserError, TypeError, ValueError) as e:
        raise UserError(f"{_TOLD}, and this method does not fit a single block: {_OUT}") from e

    def each(path: tuple, x: Any, y: Any) -> bool:
        if x.shape == y.shape:
            return False
        if x.shape == (layout.depth, *y.shape[1:]) and y.shape[0] == 1:
            return True
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise UserError(f"{_TOLD}, and {name} of this method has no row for each block: {_OUT}")

    if jax.tree.structure(every) != jax.tree.structure(single):
        raise UserError(f"{_TOLD}, and this method's values are not stacked over blocks: {_OUT}")
    return jax.tree_util.tree_map_with_path(each, every, single)


@functools.lru_cache(16)
def _made(method: Method, block: type, layout: Layout) -> tuple[Method, type]:
    """A method that leaves blocks to be merged, and the class of blocks that merge themselves."""
    rows, path, key = stacked(method, layout), layout.path, layout.key

    def plain(frozen: Any) -> Any:
        whole = replaced(frozen, path, subtree(frozen, path)[key])
        return jax.tree.map(lambda x: x.astype(jnp.float32), whole)

    def merge(frozen: Any, adapter: Any) -> Any:
        blocks = subtree(frozen, path)[key]
        rest = replaced(frozen, path, subtree(layout.zeros(), path))
        out = method.merge(rest, jax.tree.map(lambda x, row: x[:1] if row else x, adapter, rows))
        spread = lambda x, row: x if row else jnp.broadcast_to(x, (layout.depth, *x.shape))
        return replaced(out, path, {key: blocks, "adapter": jax.tree.map(spread, adapter, rows)})

    def merged(variables: Any) -> Any:
        own = variables["params"]
        blocks = jax.tree.map(_gathered, own[key], subtree(layout.shapes, path))
        frozen = replaced(layout.zeros(), path, blocks)
        adapter = jax.tree.map(lambda x, row: x[None] if row else x, own["adapter"], rows)
        out = subtree(method.merge(frozen, adapter), path)
        return {"params": jax.tree.map(lambda x: x[0], out)}

    init: Callable = lambda key, frozen: method.init(key, plain(frozen))
    made = method._replace(init=init, merge=merge, untouched=None)
    # Else the gradient would keep every merged block, or what a method makes of it.
    keep = jax.checkpoint_policies.save_only_these_names(DENSE)
    return made, nn.remat(nn.map_variables(block, "params", merged), policy=keep)


def _gathered(x: jax.Array, shape: Any) -> jax.Array:
    """A block's weight [1, ...] in float32, put together of what all devices have of it."""
    apart = [i for i, (here, all_) in enumerate(zip(x.shape, shape.shape[1:])) if here != all_]
    if apart:
        x = jax.lax.all_gather(x, "data", axis=apart[0], tiled=True)
    return x.astype(jnp.float32)[None]


@functools.lru_cache(64)
def _check_by_block(method: Method, layout: Layout) -> None:
    """UserError if a merge of two blocks is not that of each: tried on random ones."""
    rows = stacked(method, layout)
    if layout.depth == 1:
        return
    random = lambda x: 0.1 * jax.random.normal(jax.random.key(0), (2, *x.shape[1:]))
    blocks = jax.tree.map(random, subtree(layout.shapes, layout.path))
    tree = lambda which: replaced(layout.zeros(), layout.path, jax.tree.map(lambda x: x[which], blocks))
    start = method.init(jax.random.key(0), tree(slice(2)))
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), start)
    both = subtree(method.merge(tree(slice(2)), adapter), layout.path)
    for i in range(2):
        one = slice(i, i + 1)
        own = jax.tree.map(lambda x, row: x[one] if row else x, adapter, rows)
        alone = subtree(method.merge(tree(one), own), layout.path)
        for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone)):
            if not jnp.allclose(a[i], b[0], rtol=1e-3, atol=1e-4):
                raise UserError(f"{_TOLD}, and this method's merge does not treat blocks alike: {_OUT}")
