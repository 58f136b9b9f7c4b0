"""Devices as a mesh with axes ("trial", "data"), and how trees lie on it."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SHARDED = "sharded"  # key of what lies in shares over the axis "data", see `specs`
TRIAL_COST = 8  # what each step of a trial costs a device besides its images, in images


def trial_axis(devices: int, trials: int, batch_size: int) -> int:
    """Number of groups into which the devices are divided, each for its share of the trials.

    It is the number with the least work for the busiest device: ceil(trials / groups) trials, each with
    its share of the batch and `TRIAL_COST` for merging and for small matmuls.
    """

    def work(groups: int) -> int:
        return -(-trials // groups) * (-(-batch_size * groups // devices) + TRIAL_COST)

    return min((n for n in range(1, devices + 1) if devices % n == 0), key=work)


def make_mesh(devices: Sequence[jax.Device], trials: int = 1, batch_size: int = 32) -> Mesh:
    """A mesh with axes ("trial", "data") for trials of a batch size, see `trial_axis`."""
    n = trial_axis(len(devices), trials, batch_size)
    return jax.make_mesh(
        (n, len(devices) // n), ("trial", "data"), (AxisType.Auto, AxisType.Auto), devices=devices
    )


def specs(tree: Any, mesh: Mesh, *before: str) -> Any:
    """How each leaf lies on a mesh: what is under `SHARDED` in shares over "data", the rest whole.

    A share is of the longest axis, but that of blocks, that the devices divide.

    Args:
      tree: of arrays or of shapes.
      mesh: the devices.
      *before: axes of the mesh for leading axes of every leaf.
    """

    def one(path: tuple, x: Any) -> P:
        divided = lambda i: x.shape[i] and x.shape[i] % mesh.shape["data"] == 0
        inside = any(getattr(key, "key", None) == SHARDED for key in path)
        axes = [i for i in range(len(before) + 1, x.ndim) if inside and divided(i)]
        if not axes:
            return P(*before)
        axis = max(axes, key=lambda i: x.shape[i])
        return P(*before, *[None] * (axis - len(before)), "data")

    return jax.tree_util.tree_map_with_path(one, tree)


def put(mesh: Mesh, spec: P | None, tree: Any) -> Any:
    """Puts a tree, the same in every process, on the mesh.

    Every argument gets its final sharding before the first call, or the second call compiles again.

    Args:
      mesh: the devices.
      spec: how all of it lies; None is as `specs` says.
      tree: the tree.
    """
    if spec is None:
        return jax.tree.map(lambda x, spec: put(mesh, spec, x), tree, specs(tree, mesh))
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def put_trials(mesh: Mesh, trees: Sequence[Any]) -> Any:
    """Stacks one tree of each trial along a leading trial axis, and puts it on the mesh."""
    return put(mesh, P("trial"), jax.tree.map(lambda *x: jnp.stack(x), *trees))


def over_trials(function: Callable, in_axes: Sequence[int | None]) -> Callable:
    """`jax.vmap`, but a single trial runs as it is: batched matmuls of one are slower on CPUs."""
    many = jax.vmap(function, in_axes=in_axes)

    @functools.wraps(function)
    def mapped(*args):
        owned = [x for x, axis in zip(args, in_axes) if axis == 0]
        if len(jax.tree.leaves(owned)[0]) > 1:
            return many(*args)
        first = lambda x, axis: x if axis is None else jax.tree.map(lambda leaf: leaf[0], x)
        out = function(*map(first, args, in_axes))
        return jax.tree.map(lambda x: x[None], out)

    return mapped


def abstract(function: Callable, mesh: Mesh, *args: Any) -> Any:
    """Shapes of what a function mapped over trials would return, with their shardings."""
    return shapes(jax.eval_shape(function, *args), mesh, "trial")


def shapes(tree: Any, mesh: Mesh, *before: str) -> Any:
    """Shapes and shardings of a tree that lies as `specs` says."""
    add = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(add, tree, specs(tree, mesh, *before))


def without_spares(tree: Any, mesh: Mesh, number: int) -> Any:
    """A tree [T, ...] of arrays or of shapes without the trials that only fill the mesh.

    Args:
      number: number of trials that are real.
    """
    leaf = jax.tree.leaves(tree)[0]
    if len(leaf.shape) and leaf.shape[0] == number:
        return tree
    if isinstance(leaf, jax.ShapeDtypeStruct):
        cut = lambda x: jax.ShapeDtypeStruct(
            (number, *x.shape[1:]), x.dtype, sharding=_of_values(mesh, x.shape)
        )
        return jax.tree.map(cut, tree)
    return _rows(mesh, number, False)(tree)


def with_spares(tree: Any, mesh: Mesh, number: int) -> Any:
    """Undoes `without_spares`: the last trial is repeated until `number` of them fill the mesh."""
    if len(jax.tree.leaves(tree)[0]) == number:
        return tree
    return _rows(mesh, number, True)(tree)


def _of_values(mesh, shape):
    """A sharding of [T, ...] where T does not divide the devices: along the first axis that does."""
    groups = mesh.shape["trial"]
    axis = next((i for i, n in enumerate(shape) if i and n and n % groups == 0), None)
    return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, "trial"))


@functools.lru_cache(8)
def _rows(mesh, number, filled):
    """A jitted function that takes `number` trials of a tree, the last again where it has fewer."""

    def take(x):
        out = x[jnp.minimum(jnp.arange(number), len(x) - 1)]
        sharding = NamedSharding(mesh, P("trial")) if filled else _of_values(mesh, x.shape)
        return jax.lax.with_sharding_constraint(out, sharding)

    return jax.jit(lambda tree: jax.tree.map(take, tree))


def turns(tree: Any, mesh: Mesh, number: int) -> Iterator[tuple[list[int], Any]]:
    """Parts of a tree of trials [T, ...], one after another.

    Args:
      number: number of trials that each device takes at once.

    Yields:
      The indices of a part's trials, and their tree.
    """
    groups = mesh.shape["trial"]
    here = len(jax.tree.leaves(tree)[0]) // groups  # on each device, in order
    for start in range(0, here, number):
        which = [g * here + i for g in range(groups) for i in range(start, min(start + number, here))]
        if len(which) == groups * here:
            yield which, tree
        else:
            yield which, _pick(NamedSharding(mesh, P("trial")))(tree, np.array(which))


@functools.lru_cache(8)
def _pick(sharding: NamedSharding) -> Callable:
    """A jitted function `(tree, indices) -> tree` of some trials, compiled once."""
    take = lambda tree, which: jax.tree.map(lambda x: x[which], tree)
    return jax.jit(take, out_shardings=sharding)
