"""RLRR: residual-based low-rank rescaling (Dong et al., CVPR 2024), and the variants of its paper.

Every Dense of every block gets `kernel + kernel * scale_in * scale_out` and `bias + shift`; every
LayerNorm and the patch embedding get their output scaled and shifted, which folds into their weights.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax.errors import UserError
from rlrr_jax.methods.base import (
    STACK,
    Method,
    affine,
    decay_of,
    dropped_ranks,
    names_in,
    positive,
    rate,
    replaced,
    sites,
    stack,
    subtree,
    uniform,
)
from rlrr_jax.methods.sites import HEADS

FORMULA = "W' = W + W * (s_in s_out), b' = b + f; LayerNorms and patch embedding: s * y + f"
# The values the authors use most; each task of theirs brings its own.
DEFAULTS = dict(lr=3e-3, weight_decay=5e-5, drop_path=0.1)
STARTS = ("paper", "scaled", "damped", "identity", "normal", "zero", "constant", "uniform")
SIDES = {"both": ("scale_in", "scale_out"), "left": ("scale_in",), "right": ("scale_out",)}
WIDE = 768  # inputs of a kernel for which "scaled" is the paper's start
PLACES = {  # role of a layer -> where it is
    **dict.fromkeys(("query", "key", "value", "qkv", "out"), "mha"),
    **dict.fromkeys(("mlp_in", "mlp_gate", "mlp_out"), "ffn"),
    **{"norm": "norm", "embedding": "patch", "merge": "patch", "conv": "conv"},
    **{"pool": "pool", "pool_norm": "pool", "dense": "dense"},
}


class Variant(NamedTuple):
    """The options of `method`."""

    init: str
    rank: int
    with_weight: bool
    sides: str
    residual: bool
    shift: bool
    where: tuple
    layers: Any


def method(
    init: str = "paper",
    rank: int = 1,
    with_weight: bool = True,
    sides: str = "both",
    residual: bool = True,
    shift: bool = True,
    where: str = "mha+ffn+norm+patch+conv",
    layers: int | None = None,
    rank_dropout: float = 0.0,
) -> Method:
    """RLRR as a `Method`.

    Args:
      init: start of the scales. "paper", the authors', which is not the identity: `scale_in` is
        U(+-sqrt(6 / in)), `scale_out` U(+-sqrt(6)). "scaled": the first scale times in / 768
        where a kernel has fewer inputs, so that narrow backbones move less, not more, than ViT-B.
        "damped": the first scale times 0.1.
        "identity": merging changes nothing; `scale_in` is 0, those of LayerNorms and patches are 1.
        The others are rows of the paper's table 10, which names them without their values: "zero"
        (`scale_in` is 0), "normal", "constant" and "uniform" (both scales alike, their product as
        large as that of "paper"). Without `residual` both start at N(1, 0.02^2), whatever `init`.
      rank: rank of the scales' product, `S_in [in, rank] S_out [rank, out]` (table 11).
      with_weight: False adds the product itself, not times the kernel: LoRA with a shift.
      sides: "both", or only "left" (inputs) or "right" (outputs) of the kernel is rescaled; a single
        side starts at U(+-sqrt(6 / in)).
      residual: False multiplies the kernel by the product instead of adding that.
      shift: whether biases of Dense layers are shifted.
      where: places, of "mha", "ffn", "norm", "patch" (embedding of a ViT, merging of a Swin),
        "conv" (every convolution of a ResNet), "pool" (a ViT's MAP head) and "dense" (a Dense of
        another name, in no block), joined by "+".
      layers: only the first so many blocks have adapters; None: all.
      rank_dropout: probability that a rank of a layer is left out of a training step (MLAE).

    Raises UserError for other values, and for those that exclude each other.
    """
    places = names_in(where, dict.fromkeys(PLACES.values()), "place of method 'rlrr'")
    v = Variant(init, rank, with_weight, sides, residual, shift, places, layers)
    _check(v)
    rate("option rank_dropout", rank_dropout)
    if rank_dropout and v.rank == 1:
        raise UserError("option rank_dropout needs a rank above 1: set rank, too")
    return Method(
        lambda key, frozen: _init(key, frozen, v),
        lambda frozen, adapter: merge(frozen, adapter, v),
        decay,
        DEFAULTS,
        functools.partial(_drop, rank_dropout) if rank_dropout else None,
    )


def _drop(rate, key, adapter):
    """An adapter without some ranks of its Dense layers, see `dropped_ranks`."""
    flat = flatten_dict(adapter)
    for i, path in enumerate(sorted(path for path in flat if path[-1] == "scale_in")):
        flat[path] = dropped_ranks(jax.random.fold_in(key, i), flat[path], rate, STACK in path)
    return unflatten_dict(flat)


def _check(v):
    """UserError for options that cannot be, or exclude each other."""
    if v.init not in STARTS:
        raise UserError(f"unknown init {v.init!r} of method 'rlrr': use {', '.join(STARTS)}")
    if v.sides not in SIDES:
        raise UserError(f"unknown sides {v.sides!r} of method 'rlrr': use {', '.join(SIDES)}")
    positive("option rank", v.rank)
    for name in ("with_weight", "residual", "shift"):
        if not isinstance(getattr(v, name), bool):
            raise UserError(f"option {name}={getattr(v, name)} must be True or False")
    if v.layers is not None:
        positive("option layers", v.layers)
    if not v.with_weight and (v.sides != "both" or not v.residual):
        raise UserError("with_weight=False needs both sides and the residual")
    if v.rank > 1 and v.sides != "both":
        raise UserError(f"rank={v.rank} needs both sides")


def _init(key, frozen, v):
    frozen, flat = _first(frozen, v.layers), {}
    for i, site in enumerate(sites(frozen)):
        if PLACES.get(site.role) in v.where:
            node, kind = subtree(frozen, site.path), site.role.rpartition("_")[2]
            start = {"norm": _affine, "embedding": _affine, "conv": _conv}.get(kind)
            start = start or functools.partial(_dense if site.depth else _single, site.path[-1])
            own = jax.random.fold_in(key, i)
            if start is _conv and site.depth:  # of each channel alone
                make = jax.vmap(lambda key, node: _conv(key, node, v))
                flat[site.path] = make(jax.random.split(own, site.depth), node)
            else:
                flat[site.path] = start(own, node, v)
    return unflatten_dict(flat)


def _affine(key, node, v):
    """Scale and shift of a LayerNorm or of the patch embedding."""
    if "bias" not in node:
        raise UserError(
            "it shifts norms, and one of this model has no bias: leave norms out of its where"
        )
    shape = node["bias"].shape
    if v.init == "identity":
        return {"scale": jnp.ones(shape), "shift": jnp.zeros(shape)}
    noise = 0.02 * jax.random.normal(jax.random.split(key)[0], (2, *shape))
    return {"scale": 1 + noise[0], "shift": noise[1]}


def _dense(name, key, node, v):
    """The adapter node beside a Dense of every block."""
    kernel = node["kernel"]
    outputs = (len(kernel), *kernel.shape[2 if name in HEADS else -1 :])  # [L, ...]
    inputs = node["kernel"].shape[: node["kernel"].ndim - len(outputs) + 1]  # [L, ...]
    fan_in = math.prod(inputs[1:])
    shapes = {
        "scale_in": (*inputs, v.rank) if v.rank > 1 else inputs,
        "scale_out": (outputs[0], v.rank, *outputs[1:]) if v.rank > 1 else outputs,
    }
    # The authors' Kaiming-uniform start: fan-in is the kernel's, and the rank's for `scale_out`.
    bounds = {"scale_in": math.sqrt(6 / fan_in), "scale_out": math.sqrt(6 / v.rank)}
    if v.sides != "both":
        bounds["scale_out"] = bounds["scale_in"]
    # Of both, for a product as large: rank random terms add up less than equal ones.
    alike = math.sqrt(2) * (fan_in * v.rank ** (2 if v.init == "constant" else 1)) ** -0.25
    if v.sides != "both":
        alike = math.sqrt(2 / fan_in)
    keys = dict(zip(shapes, jax.random.split(key)))

    def start(name):
        key, shape = keys[name], shapes[name]
        if not v.residual:
            return (1 + 0.02 * jax.random.normal(key, shape)) / math.sqrt(v.rank)
        if v.init in ("normal", "constant", "uniform"):
            draw = {
                "normal": lambda: jax.random.normal(key, shape),
                "constant": lambda: jnp.ones(shape),
                "uniform": lambda: uniform(key, shape, math.sqrt(3)),
            }[v.init]
            return draw() * alike
        narrow = min(1, fan_in / WIDE)
        damp = {"scaled": narrow, "damped": 0.1, "identity": 0, "zero": 0}.get(v.init, 1)
        first = name == SIDES[v.sides][0]
        return uniform(key, shape, bounds[name]) * (damp if first else 1)

    tree = {name: start(name) for name in SIDES[v.sides]}
    return {**tree, "shift": jnp.zeros(outputs)} if v.shift and "bias" in node else tree


def _single(name, key, node, v):
    """The adapter node beside a Dense that is in no block."""
    return jax.tree.map(lambda x: x[0], _dense(name, key, jax.tree.map(lambda x: x[None], node), v))


def _conv(key, node, v):
    """The adapter node beside a convolution, with a shift if that has a bias, see `_convolved`."""
    size, _, inputs, outputs = node["kernel"].shape
    matrix = {
        "kernel": jnp.zeros((1, inputs * size, outputs * size)),
        "bias": jnp.zeros((1, outputs * size)),
    }
    tree, rank = _dense("", key, matrix, v), (v.rank,) if v.rank > 1 else ()
    shapes = {"scale_in": (inputs, size, *rank), "scale_out": (*rank, outputs, size)}
    tree = {name: tree[name].reshape(shapes[name]) for name in SIDES[v.sides]}
    return {**tree, "shift": jnp.zeros(outputs)} if v.shift and "bias" in node else tree


def _first(frozen, layers):
    """A tree with only the first blocks."""
    if layers is None:
        return frozen
    path = stack(frozen)
    blocks = subtree(frozen, path)
    if layers > (depth := len(blocks["LayerNorm_0"]["scale"])):
        raise UserError(f"option layers={layers} is more than the {depth} blocks of the model")
    return replaced(frozen, path, jax.tree.map(lambda x: x[:layers], blocks))


def merge(frozen: Any, adapter: Any, v: Variant) -> Any:
    """Folds the scales and shifts into the frozen weights: a plain tree."""
    params = _merge(_first(frozen, v.layers), adapter, v)
    if v.layers is None:
        return params
    join = lambda first, every: jnp.concatenate([first, every[v.layers :]])
    path = stack(frozen)
    return replaced(params, path, jax.tree.map(join, subtree(params, path), subtree(frozen, path)))


def _merge(frozen, adapter, v, stacked=False):
    if "scale" in adapter:
        return affine(frozen, **adapter)
    if not adapter.keys() & {"scale_in", "scale_out"}:
        inner = lambda k, x: _merge(x, adapter[k], v, stacked or k == STACK)
        return {k: inner(k, x) if k in adapter else x for k, x in frozen.items()}
    if frozen["kernel"].ndim == 4 + stacked:  # of each block, where it is of each channel alone
        convolved = lambda kernel, adapter: _convolved(kernel, adapter, v)
        convolved = jax.vmap(convolved) if stacked else convolved
        return {"kernel": convolved(frozen["kernel"], adapter), **_moved(frozen, adapter)}
    if not stacked:
        nodes = jax.tree.map(lambda x: x[None], (frozen, adapter))
        return jax.tree.map(lambda x: x[0], _merge(*nodes, v, True))
    kernel, depth = frozen["kernel"], len(frozen["kernel"])
    equation, shape = ("li,lo->lio", (depth, -1)) if v.rank == 1 else ("lir,lro->lio", None)
    both = ("scale_in", "scale_out")
    one, other = both if both[0] in adapter else both[::-1]
    rest = depth * kernel.size // adapter[one].size  # of the other side, which may not be there
    sides = {one: adapter[one], other: adapter.get(other, jnp.ones((depth, rest // depth)))}
    left, right = (sides[name] for name in both)
    left = left.reshape(shape or (depth, -1, v.rank))
    right = right.reshape(shape or (depth, v.rank, -1))
    # An einsum, because its gradients are matrix-vector products, see `affine`.
    product = jnp.einsum(equation, left, right, precision="highest").reshape(kernel.shape)
    change = kernel * product if v.with_weight else product
    return {"kernel": kernel + change if v.residual else change, **_moved(frozen, adapter)}


def _moved(frozen, adapter):
    """The bias of a layer, if it has one, with the shift, if that is trained."""
    return {"bias": frozen["bias"] + adapter.get("shift", 0)} if "bias" in frozen else {}


def _convolved(kernel, adapter, v):
    """A kernel [k, k, in, out] seen as a matrix of (in, column) by (out, row), rescaled.

    Dong et al. (2024), supplement G; authors' models/RLRR_ResNet.py. Convolutions have no bias there,
    and no shift.
    """
    size, _, inputs, outputs = kernel.shape
    left = adapter.get("scale_in", jnp.ones((inputs, size))).reshape(inputs, size, v.rank)
    right = adapter.get("scale_out", jnp.ones((outputs, size))).reshape(v.rank, outputs, size)
    product = jnp.einsum("iwr,roh->hwio", left, right, precision="highest")
    change = kernel * product if v.with_weight else product
    return kernel + change if v.residual else change


def decay(adapter: Any) -> Any:
    """The authors' rule: their names with neither `bias` nor `norm` in them.

    That is `scale_in`, `scale_out`, and the patch scale and shift.
    """
    tree = decay_of("scale_in", "scale_out")(adapter)
    if "embedding" in tree:
        tree["embedding"] = jax.tree.map(lambda _: True, tree["embedding"])
    return tree
