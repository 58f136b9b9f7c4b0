"""The contract of a method: what it promises is compared with what it does, before any work."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax.errors import UserError
from rlrr_jax.methods.base import Method


def check(name: str, method: Method, frozen: Any) -> Any:
    """Checks what a method promises on a model's tree, without computing anything.

    Returns the shapes of the adapter.

    Raises UserError, naming the leaf, if `init` makes what cannot be trained and read back from a file,
    if `merge` returns other names, shapes or dtypes than the frozen tree's, if either gives two results
    for one input, if `decay` is no tree of bools, or if `DEFAULTS` lacks a key.
    """
    told = f"method {name!r} breaks its contract: "
    if missing := {"lr", "weight_decay", "drop_path"} - method.DEFAULTS.keys():
        raise UserError(f"{told}its DEFAULTS have no {', '.join(sorted(missing))}: add them")
    try:
        start, adapter = _traced(method.init, jax.random.key(0), frozen)
    except UserError as e:
        reason = f"method {name!r} does not fit this model: {e}"
        more = "" if ": " in str(e) else " (python -m rlrr_jax.methods --model NAME lists what fits)"
        raise UserError(reason + more) from e
    if not isinstance(adapter, dict) or {"head", "loss"} & adapter.keys():
        raise UserError(
            f"{told}init must return a dict without 'head' and 'loss', which are trained beside it"
        )
    _check_leaves(told, adapter)
    wider = {**frozen, "head": jax.tree.map(_wider, frozen["head"])}
    other = leaves(jax.eval_shape(method.init, jax.random.key(0), wider))
    if changed := [key for key, shape in leaves(adapter).items() if other.get(key) != shape]:
        raise UserError(
            f"{told}{changed[0]} depends on the number of classes: leave the head out of init"
        )
    merged, params = _traced(method.merge, frozen, adapter)
    found, wanted = leaves(params), leaves(frozen)
    if "block" in method.DEFAULTS:  # which reads more
        found = {key: found[key] for key in wanted if key in found}
    _same_leaves(f"{told}merge returns ", found, wanted)
    _check_pure(f"{told}init", start, method.init, jax.random.key(0), frozen)
    _check_pure(f"{told}merge", merged, method.merge, frozen, adapter)
    decay = method.decay(adapter)
    structure: Any = jax.tree.structure(decay)
    if structure != jax.tree.structure(adapter) or not all(
        isinstance(x, bool) for x in jax.tree.leaves(decay)
    ):
        raise UserError(f"{told}decay must return True or False for each leaf that init makes")
    return adapter


def _wider(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of a head's array for one class more; scalars and others stay."""
    return jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] + 1) if x.shape else (), x.dtype)


def _check_leaves(told: str, node: Any, path: tuple[str, ...] = ()) -> None:
    """UserError unless a tree is dicts of float32 arrays whose names are those of a file."""
    where = "/".join(path)
    if isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str) or not key or "/" in key:
                inside = f" in {where}" * bool(path)
                raise UserError(f"{told}the key {key!r}{inside} must be a text without '/', not empty")
            _check_leaves(told, value, (*path, key))
        return
    if not hasattr(node, "dtype") or not hasattr(node, "shape"):
        kind = "None" if node is None else f"a {type(node).__name__}"
        raise UserError(f"{told}{where} is {kind}: init must return dicts of arrays")
    if node.dtype != jnp.float32:
        raise UserError(f"{told}{where} is {node.dtype}{list(node.shape)}: init must return float32")


def _traced(function: Callable, *arguments: Any) -> Any:
    """The program of a function, traced anew, and the shapes that it returns."""
    return jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*arguments)


def _check_pure(what: str, first: Any, function: Callable, *arguments: Any) -> None:
    """UserError if a function gives two programs for one input, as NumPy's random numbers do."""
    second, _ = _traced(function, *arguments)
    same = str(first.jaxpr) == str(second.jaxpr) and len(first.consts) == len(second.consts)
    same = same and all(map(_equal, first.consts, second.consts))
    if not same:
        raise UserError(
            f"{what} gives two results for one input: use no random numbers but those of its key, and "
            f"nothing that changes from call to call"
        )


def _equal(a: Any, b: Any) -> bool:
    """Whether two arrays, or keys, have the same values."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(a, b, equal_nan=bool(jnp.issubdtype(a.dtype, jnp.inexact)))


def leaves(tree: Any) -> dict[str, tuple]:
    """`{"a/b": (shape, dtype)}` of a tree."""
    key = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {key(path): (tuple(x.shape), str(jnp.dtype(x.dtype))) for path, x in flat}


def _same_leaves(what, found, wanted):
    for key in sorted(wanted.keys() | found.keys()):
        if key not in found:
            raise UserError(f"{what}no {key}, which the model has")
        if key not in wanted:
            raise UserError(f"{what}{key}, which the model does not have")
        if found[key] != wanted[key]:
            (shape, dtype), (right, kind) = found[key], wanted[key]
            raise UserError(f"{what}{key} as {dtype}{list(shape)} instead of {kind}{list(right)}")
