"""What a fine-tuning method is, and what several of them need."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError, nearest
from rlrr_jax.methods.sites import DENSE, STACK, Site, dense, replaced, sites, stack, subtree

__all__ = ["DENSE", "STACK", "Site", "dense", "replaced", "sites", "stack", "subtree"]  # for methods

# What gets its input straight from a LayerNorm of a block.
AFTER_NORM = {"attention": ("query", "key", "value"), "mlp": ("Dense_0", "gate")}
_NORMS = {"attention": "LayerNorm_0", "mlp": "LayerNorm_1"}

# Merging is done in float32 everywhere: in bfloat16 or TF32 a small change is lost.
dot = functools.partial(jnp.matmul, precision="highest")
FIXED = "fixed"  # key of an adapter's values that are not trained


class Untrained(NamedTuple):
    """How a method answers that trains nothing: by features of training images, as neighbours.

    A bank is features [N, D], what the head would get, and targets [N, C]: 1 for an image's class or
    its labels, or its value.

    Attributes:
      choose: function `(bank, (features, targets) held out, judge) -> options`, chosen by `judge`, a
        function from answers on the held-out images to their score or None.
      answer: function `(bank, features [n, D], same=False, **options) -> mean targets [n, C]`; with
        `same` the features are the bank's, and none answers for itself.
    """

    choose: Callable[..., dict]
    answer: Callable[..., Any]


class Method(NamedTuple):
    """A re-parameterisation of a model's weights.

    The head is no method's business: it is trained beside what `init` makes, see `start` and `merge`.

    Attributes:
      init: function `(key, frozen) -> adapter`, the tree that is trained; works under `jax.eval_shape`.
        With an argument `training=None` more it may look at the training images, see `Training`, for
        other values of the same shapes.
      merge: function `(frozen, adapter) -> params`, a plain tree again; pure and differentiable. With a
        `block` of its own, see below, it may add names that this reads.
      decay: function `adapter -> tree of bools`, which leaves get weight decay.
      DEFAULTS: the method's own `lr`, `weight_decay` and `drop_path`, used where neither the config
        nor the task's recipe says otherwise; and where it needs others than the plain ones, the names
        of a `loss` and of a `block` that the model is built with.
      drop: function `(key, adapter) -> adapter` of each training step, such as dropout of ranks; None
        for most methods.
      untouched: function `number of blocks -> how many of the first are not changed`, nor what comes
        before them; more than all is everything but the head. Their outputs are computed once, see
        `prefix`. None for most methods.
      untrained: how a method answers that trains nothing; `init` and `merge` change nothing then.

    What `init` puts under `FIXED` is saved with the adapter, and not trained: `merge` must stop its
    gradient.
    """

    init: Callable[[jax.Array, Any], Any]
    merge: Callable[[Any, Any], Any]
    decay: Callable[[Any], Any]
    DEFAULTS: dict
    drop: Callable[[jax.Array, Any], Any] | None = None
    untouched: Callable[[int], int] | None = None
    untrained: Untrained | None = None

    def __hash__(self) -> int:
        return hash((self.init, self.merge))  # programs are kept by it; a dict has no hash


class Training:
    """What `Method.init` may look at before training: the images, and the model they are for.

    Attributes:
      model: the flax model.
      frozen: the pretrained tree.
      pixels: size of the images that it takes, and of what their middle is cut from, or None.
      precision: precision of matmuls.
      batches: function `() -> iterator` of uint8 images [b, h, w, 3], labels [b] and mask [b], all of
        one shape, shuffled.
    """

    def __init__(
        self, model: Any, frozen: Any, pixels: tuple, precision: str, batches: Callable[[], Iterable]
    ):
        self.model, self.frozen, self.pixels = model, frozen, pixels
        self.precision, self.batches = precision, batches
        self._known: dict = {}

    def once(self, function: Callable[["Training"], Any]) -> Any:
        """`function(self)`, computed the first time that it is asked for: trials share it."""
        if function not in self._known:
            self._known[function] = function(self)
        return self._known[function]


def asks_training(method: "Method") -> bool:
    """Whether a method's `init` looks at the training images."""
    return "training" in inspect.signature(method.init).parameters


# The trained tree: `{"adapter": what the method makes, "head": kernel and bias}` -----------------


def start(method: "Method", key: jax.Array, frozen: Any) -> dict:
    """The trained tree before training; every head is zero."""
    head = jax.tree.map(lambda x: jnp.zeros(x.shape), frozen["head"])
    return {"adapter": method.init(key, frozen), "head": head}


def merge(method: "Method", frozen: Any, trained: Any, key: jax.Array | None = None) -> dict:
    """The plain tree that a trained tree makes of a frozen one.

    Args:
      method: a `Method`.
      frozen: a model's tree.
      trained: what `start` returned, trained.
      key: of a training step, for `Method.drop`; None drops nothing.
    """
    adapter = trained["adapter"]
    if key is not None and method.drop is not None:
        adapter = method.drop(key, adapter)
    return {**method.merge(frozen, adapter), "head": trained["head"]}


def decay(method: "Method", trained: Any) -> dict:
    """Which leaves of a trained tree get weight decay: beside the adapter's, those called "kernel"."""
    rest = {name: decay_of("kernel")(node) for name, node in trained.items() if name != "adapter"}
    return {"adapter": method.decay(trained["adapter"]), **rest}


def trained(tree: Any) -> Any:
    """Which leaves of a trained tree training changes: all but the adapter's `FIXED`."""
    fixed = lambda path: len(path) > 1 and (path[0].key, path[1].key) == ("adapter", FIXED)
    return jax.tree_util.tree_map_with_path(lambda path, _: not fixed(path), tree)


def trainable_count(trained: Any) -> int:
    """Number of trained values outside the head."""
    adapter = {name: node for name, node in trained["adapter"].items() if name != FIXED}
    return sum(x.size for x in jax.tree.leaves(adapter))


def head_count(trained: Any) -> int:
    """Number of trained values in the head, and of a loss that trains some."""
    rest = {name: node for name, node in trained.items() if name != "adapter"}
    return sum(x.size for x in jax.tree.leaves(rest))


def decay_of(*names: str) -> Callable[[Any], Any]:
    """The decay rule "leaves of these names", such as `decay_of("kernel")`."""
    rule = lambda path, _: path[-1].key in names
    return functools.partial(jax.tree_util.tree_map_with_path, rule)


def names_in(text: Any, known: Any, what: str) -> tuple[str, ...]:
    """`"query+value"` -> `("query", "value")`; UserError, with the nearest, for an unknown name."""
    names = tuple(dict.fromkeys(str(text).split("+")))
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"unknown {what} {name!r}: {hint}, joined by +: {', '.join(known)}")
    return names


def positive(what: str, value: Any) -> None:
    """UserError unless an option is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{what}={value} must be a whole number greater than 0")


def rate(what: str, value: Any) -> None:
    """UserError unless an option is a probability below 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise UserError(f"{what}={value} must be at least 0 and less than 1")


def dropped_ranks(key: jax.Array, factor: jax.Array, rate: float, stacked: bool = True) -> jax.Array:
    """A factor [..., r] without some ranks, the others enlarged: dropout of MLAE's experts.

    Args:
      key: of the step and the layer.
      factor: [L, ..., r] of the layers of L blocks, or [..., r] of a layer that is in none.
      rate: probability that a rank is left out.
      stacked: whether its first axis is that of blocks.

    MLAE (Wang et al., 2024, arXiv 2405.18897) drops each rank of each layer on its own, in every step
    anew, for the whole batch.
    """
    layers = factor.shape[0] if stacked else 1
    kept = jax.random.bernoulli(key, 1 - rate, (layers, factor.shape[-1])) / (1 - rate)
    return factor * kept.reshape(
        *((layers,) if stacked else ()), *(1,) * (factor.ndim - 1 - stacked), -1
    )


def number(what: str, value: Any) -> None:
    """UserError unless an option is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{what}={value} must be a number")


def seed(what: str, value: Any) -> None:
    """UserError unless an option can seed a key: JAX's keys take 32 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise UserError(f"{what}={value} must be a whole number from 0 to 2^32 - 1")


# Trees ----------------------------------------------------------------------------------------


def sizes(frozen: Any, names: Iterable[str] = DENSE) -> dict[str, tuple]:
    """`{name: (L, in, out)}` of Dense layers, heads flattened."""
    return {k: (s.depth, s.inputs, s.outputs) for k, s in dense(frozen, names).items()}


def change_dense(frozen: Any, names: Iterable[str], change: Callable) -> Any:
    """A tree with other weights in these Dense layers of every block.

    Args:
      frozen: a model's tree.
      names: names of Dense layers, see `sites.dense`.
      change: `(name, kernel [L, in, out], bias [L, out]) -> kernel, bias`; bias is None of a layer that
        has none.
    """
    for name, site in dense(frozen, names).items():
        node = subtree(frozen, site.path)
        new = dict(zip(("kernel", "bias"), change(name, *weights(frozen, site))))
        new = {key: x for key, x in new.items() if key in node}
        if site.third is not None:
            columns = slice(site.third * site.outputs, (site.third + 1) * site.outputs)
            new = {key: node[key].at[..., columns].set(x) for key, x in new.items()}
        new = {key: x.reshape(node[key].shape) for key, x in new.items()}
        frozen = replaced(frozen, site.path, new)
    return frozen


def weights(tree: Any, site: Site) -> tuple[jax.Array, Any]:
    """Kernels [L, in, out] and biases [L, out], or None, of a Dense of every block, heads flattened."""
    node = subtree(tree, site.path)
    if site.third is None:
        shape = (site.depth, site.inputs, site.outputs)
        return node["kernel"].reshape(shape), node["bias"].reshape(shape[::2]) if site.bias else None
    kernel, bias = (jnp.split(node[key], 3, axis=-1)[site.third] for key in ("kernel", "bias"))
    return kernel, bias


def one_width(frozen: Any) -> tuple[int, int]:
    """Number and width of a model's blocks; UserError if they differ in width."""
    stack(frozen)
    return sizes(frozen)["query"][:2]


def uniform(key: jax.Array, shape: tuple, bound: float) -> jax.Array:
    """Values between -bound and bound."""
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * bound


def affine(node: Any, scale: jax.Array, shift: jax.Array | None = None) -> dict:
    """Folds `y * scale + shift` of the output of a Dense, LayerNorm or patch embedding into it.

    One without a bias takes no shift.
    """
    name = "kernel" if "kernel" in node else "scale"
    weight = node[name]
    if weight.ndim > scale.ndim > 1:  # a Dense of every block
        depth, *outputs = scale.shape
        flat = weight.reshape(depth, -1, math.prod(outputs))
        scaled = columns(flat, scale.reshape(depth, -1)).reshape(weight.shape)
    else:
        scaled = weight * scale.reshape((1,) * (weight.ndim - scale.ndim) + scale.shape)
    return {name: scaled} if shift is None else {name: scaled, "bias": node["bias"] * scale + shift}


def columns(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """Every column of kernels [L, in, out] times its own factor [L, out]."""
    # An einsum, because its gradients are matrix-vector products: under `vmap` XLA's CPU code for the
    # sums of a broadcast product is ten times slower.
    return jnp.einsum("lio,lo->lio", kernel, scale, precision="highest")


def prepend(frozen: Any, place: str, down: Any, up: Any, shift: Any) -> Any:
    """Folds `x + x down up + shift` into what follows a LayerNorm of every block.

    The shift goes into the biases of what follows, or where one of these has none into the LayerNorm's:
    UserError if the model is no ViT then.

    Args:
      place: a name of `AFTER_NORM`.
      down, up: [L, D, r] and [r, D] or [L, r, D].
      shift: [L, D].
    """

    names = AFTER_NORM[place]
    before = not all(site.bias for site in dense(frozen, names).values())

    def change(name, kernel, bias):
        new = kernel + dot(down, dot(up, kernel))
        return new, bias if before else bias + dot(shift[:, None], kernel)[:, 0]

    if before:
        path = (*stack(frozen), _NORMS[place])
        norm = subtree(frozen, path)
        frozen = replaced(frozen, path, {**norm, "bias": norm["bias"] + _ahead(down, up, shift)})
    return change_dense(frozen, names, change)


def _ahead(down: jax.Array, up: jax.Array, shift: jax.Array) -> jax.Array:
    """The t [L, D] of which `t + t down up` is a shift, by Woodbury's identity."""
    inner = jnp.eye(down.shape[-1])[None] + dot(up, down)  # [L, r, r]
    back = jnp.linalg.solve(inner, jnp.broadcast_to(up, (len(inner), *up.shape[1:])))
    return shift - dot(dot(shift[:, None], down), back)[:, 0]
