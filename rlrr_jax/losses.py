"""What is minimised. To add a loss, write a function like `cross_entropy`; its name is a path.

A loss is called for each trial and step, with this device's share of the batch, or a part of it:

    loss(net, batch, **options) -> losses, values

Args:
  net: the `Net`.
  batch: the `Batch`.
  **options: `config.loss_kwargs`. Real numbers are traced, so that runs which differ in them train
    together; the rest is fixed.

Returns:
  The loss of each image [b], and a dict of other values of each image [b], whose means are reported
  as `train_<name>`: "acc", and what else there is to see. The step multiplies by the mask, and divides
  by the number of images in the batch over all devices. A value named "remember" [b, classes] is not
  reported, but comes back as `batch.remembered` when the same images are in a batch again.

Where `config.class_weights` is set, the loss of each image is multiplied by the weight of its class; a
loss with an argument `class_weights` [classes] weighs by itself.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlrr_jax import lookup, methods
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.methods import Method
from rlrr_jax.recipe import Batch, Recipe


class Net(NamedTuple):
    """What a loss calls for logits: `net(images, keys)`, float32 [b, classes], and what it is made of.

    It may be called more than once, and on some of the images.

    Attributes:
      model: the flax model.
      method: the `methods.Method`.
      frozen: the backbone's tree.
      params: the tree that the method merged, with the head.
      trained: `{"adapter", "head"}`, and "loss", what the loss trains itself (`Loss.init`).
      drop_path: drop rate of the last block, traced.
      noisy: whether drop path is in the program.
    """

    model: Any
    method: Method
    frozen: Any
    params: Any
    trained: Any
    drop_path: Any = 0.0
    noisy: bool = False

    def inputs(self, images: jax.Array, keys: jax.Array) -> tuple:
        """What the model takes in training: images, the drop rate, and keys of its noise or None."""
        return images, self.drop_path, keys if self.noisy else None

    def __call__(self, images: jax.Array, keys: jax.Array) -> jax.Array:
        """Logits of images in [-1, 1], with drop path from these keys."""
        return self.model.apply({"params": self.params}, *self.inputs(images, keys))


Values = tuple[jax.Array, dict[str, jax.Array]]


class Loss(NamedTuple):
    """A loss that trains values of its own: heads, prototypes, temperatures. A path may name one.

    Attributes:
      function: what is minimised, see above; it finds its values in `net.trained["loss"]`.
      init: function `(key, frozen, classes, **options) -> tree of float32` of these values at the
        start; they are saved with the adapter, and those called "kernel" get weight decay.
      values: names of what the function returns besides the loss, see `check_contract`.
      kinds: kinds of labels that it learns, see `metrics.KINDS`.
      plain: whether it needs nothing but the logits of the batch, so that what the training does not
        change may be computed once, see `prefix`.
    """

    function: Callable[..., Values]
    init: Callable[..., Any] | None = None
    values: tuple[str, ...] = ("acc",)
    kinds: tuple[str, ...] = ("class",)
    plain: bool = False

    def __call__(self, net: Net, batch: Batch, **numbers: Any) -> Values:
        """The loss of each image, and other values."""
        return self.function(net, batch, **numbers)


def cross_entropy(net: Net, batch: Batch) -> Values:
    """Softmax cross-entropy, and whether the answer is right."""
    logits = net(batch.images, batch.keys)
    losses = cross_entropies(logits, batch)
    return losses, {"acc": correct(logits, batch.labels, losses)}


def _binary(net: Net, batch: Batch, class_weights: Any = None) -> Values:
    """Sigmoid cross-entropy, the mean over labels, and how many of an image's labels are right.

    With weights, the part of a label that an image has is multiplied by that label's.
    """
    logits, targets = net(batch.images, batch.keys), batch.targets
    hot = jax.nn.one_hot(batch.labels, logits.shape[-1]) if batch.labels.ndim == 1 else batch.labels
    targets = hot if targets is None else targets
    weights = 1.0 if class_weights is None else class_weights[None]
    yes, no = targets * jax.nn.log_sigmoid(logits), (1 - targets) * jax.nn.log_sigmoid(-logits)
    losses = -(weights * yes + no).mean(-1)
    if batch.labels.ndim == 1:
        return losses, {"acc": correct(logits, batch.labels, losses)}
    return losses, {"acc": ((logits > 0) == (hot > 0)).mean(-1) * jnp.isfinite(losses)}


def _squared(net: Net, batch: Batch) -> Values:
    """Squared error of a value, in units of its deviation over the training images."""
    return (net(batch.images, batch.keys)[:, 0] - batch.labels) ** 2, {}


def _huber(net: Net, batch: Batch, delta: float = 1.0) -> Values:
    """Huber's loss of a value: squared up to an error of `delta` deviations, then linear."""
    return optax.huber_loss(net(batch.images, batch.keys)[:, 0], batch.labels, delta=delta), {}


def cross_entropies(logits: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy of each image [b] to its label, or to its targets."""
    if batch.targets is None:
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return optax.softmax_cross_entropy(logits, batch.targets)


def correct(logits: jax.Array, labels: jax.Array, losses: jax.Array) -> jax.Array:
    """Whether each answer is right [b]; with a loss that is not finite it is not."""
    return (logits.argmax(-1) == labels) & jnp.isfinite(losses)  # of NaN, argmax is class 0


binary = Loss(_binary, kinds=("class", "labels"), plain=True)
squared = Loss(_squared, values=(), kinds=("value",), plain=True)
huber = Loss(_huber, values=(), kinds=("value",), plain=True)


# Weights of classes -----------------------------------------------------------------------------


def balanced(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weights of classes [classes] that give each the same part; their mean over images is 1.

    As scikit-learn's "balanced": images / (classes that there are x images of the class). Where an
    image has several labels, each gets the number of images without it for each that has it.

    Args:
      labels: of the training images, [N] or [N, classes].
      classes: number of classes.
    """
    if labels.ndim == 2:
        counts = labels.sum(0)
        return np.where(counts > 0, (len(labels) - counts) / np.maximum(counts, 1), 1.0)
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / ((counts > 0).sum() * np.maximum(counts, 1)), 0.0)


def weighted(function: Callable[..., Values]) -> Callable[..., Values]:
    """A loss whose images count by the weights of their classes, an argument `class_weights`."""
    if "class_weights" in inspect.signature(function).parameters:
        return function

    def weighed(net: Net, batch: Batch, class_weights: Any, **numbers: Any) -> Values:
        losses, values = function(net, batch, **numbers)
        if batch.labels.ndim != 1 or not jnp.issubdtype(batch.labels.dtype, jnp.integer):
            raise UserError("a loss of several labels weighs by itself: give it class_weights=None")
        mixed = class_weights[batch.labels] if batch.targets is None else batch.targets @ class_weights
        return losses * mixed, values

    return weighed


# Names and options ----------------------------------------------------------------------------


def find(name: str) -> Loss:
    """The `Loss` of a name; UserError for an unknown one."""
    found = lookup.find("loss", name)
    return found if isinstance(found, Loss) else Loss(found, plain=found is cross_entropy)


def get(
    name: str, fixed: dict[str, Any], values: tuple[str, ...] = ("acc",), weigh: bool = False
) -> Loss:
    """The `Loss` of a name with its fixed options, and the names of what it returns.

    Args:
      name: of the loss.
      fixed: options that are in the program.
      values: names of what it returns besides itself.
      weigh: whether it gets weights of classes.
    """
    loss = find(name)
    bind = lambda f: functools.partial(f, **fixed) if f and fixed else f
    function = weighted(bind(loss.function)) if weigh else bind(loss.function)
    return loss._replace(function=function, init=bind(loss.init), values=values)


def options(name: str) -> dict[str, Any]:
    """A loss's options and their defaults."""
    parameters = list(inspect.signature(find(name).function).parameters.values())[2:]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    named = [p for p in named if p.name != "class_weights"]
    if missing := [p.name for p in named if p.default is p.empty]:
        raise UserError(f"option {missing[0]!r} of loss {name!r} has no default: give it one")
    return {p.name: p.default for p in named}


def check(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of a loss; UserError for an unknown one, or a value of another kind."""
    known = options(name)
    for key, value in given.items():
        if key not in known:
            raise unknown(f"option of loss {name!r}", key, known)
        kind = type(known[key])
        if kind in (int, float) and not _like(value, known[key]):
            raise UserError(f"config.loss_kwargs.{key}={value} must be a number like {known[key]}")
        if kind is int and value < 1 <= known[key]:
            raise UserError(f"config.loss_kwargs.{key}={value} must be at least 1")
    values = {key: given.get(key, default) for key, default in known.items()}
    return {k: v if known[k] is None else type(known[k])(v) for k, v in values.items()}


def _like(value: Any, default: Any) -> bool:
    """Whether a value is a finite number, whole or not negative if the default is."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return (value >= 0 or default <= 0) and (isinstance(default, float) or value == int(value))


def fixed(given: dict[str, Any]) -> dict[str, Any]:
    """The options that are in the program: all but real numbers, which are traced."""
    return {key: value for key, value in given.items() if not isinstance(value, float)}


def of(recipe: Recipe) -> Loss:
    """The loss of a recipe."""
    return recipe.loss or Loss(cross_entropy, plain=True)


def start(loss: Loss, method: Method, key: jax.Array, frozen: Any) -> dict:
    """The trained tree before training: adapter, head, and what the loss trains."""
    trained = methods.start(method, key, frozen)
    if loss.init is not None:
        own = jax.random.fold_in(key, 2**31 - 1)
        trained["loss"] = loss.init(own, frozen, frozen["head"]["bias"].size)
    return trained


# The contract ---------------------------------------------------------------------------------


def check_contract(
    name: str, given: dict[str, Any], net: tuple, image_size: tuple, kind: str = "class"
) -> tuple[str, ...]:
    """UserError unless a loss returns what this module says, of two images, without computing anything.

    Args:
      name: of the loss.
      given: all its options.
      net: the model, the `Method`, and the shapes of the frozen tree.
      image_size: height and width of the images.
      kind: of the labels, see `metrics.KINDS`.

    Returns:
      The names of the values that it returns besides itself.
    """
    loss, number, classes = get(name, fixed(given)), 2, net[0].num_classes
    try:
        losses, values = _traced(loss, net, (number, kind), image_size, given)
    except jax.errors.ConcretizationTypeError as e:
        raise UserError(
            f"loss {name!r} decides by a number that is traced, as its options of real numbers and "
            f"batch.step are: use jnp.where or jax.lax.cond instead of if"
        ) from e
    for key_of, x in {"its losses": losses, **values}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating) and (key_of == "its losses"):
            raise UserError(f"loss {name!r} returns {x.dtype}, which has no gradient: return float32")
    shapes = {"losses": losses.shape, **{key: x.shape for key, x in values.items()}}
    for name_of, shape in shapes.items():
        wanted = (number, classes) if name_of == "remember" else (number,)
        if shape != wanted:
            raise UserError(
                f"loss {name!r} must return {name_of} of shape {wanted} for {number} images, not "
                f"{shape}: return one for each image"
            )
    if ("acc" not in values and kind != "value") or "loss" in values:
        raise UserError(f"loss {name!r} must return the value 'acc', and none of name 'loss'")
    return tuple(sorted(values))


def _traced(loss: Loss, net: tuple, of: tuple, image_size: tuple, given: dict[str, Any]) -> Values:
    """Shapes of what a loss returns for so many images on one device; its real numbers are traced."""
    model, method, frozen = net
    number, kind = of
    numbers = {key: jnp.float32(x) for key, x in given.items() if isinstance(x, float)}

    def call(key: jax.Array, frozen: Any, batch: Batch, numbers: dict[str, jax.Array]) -> Values:
        trained = start(loss, method, key, frozen)
        made = Net(model, method, frozen, methods.merge(method, frozen, trained), trained)
        one = lambda b: loss(made, b, **numbers)
        return jax.tree.map(lambda x: x[0], jax.vmap(one, axis_name="data")(batch))

    def batch() -> Batch:  # a device's
        images, zero = jnp.zeros((1, number, *image_size, 3)), jnp.zeros((1, number), jnp.int32)
        keys = jax.random.split(jax.random.key(0), (1, number))
        logits = jnp.zeros((1, number, model.num_classes))
        labels = {"class": zero, "labels": logits, "value": jnp.zeros((1, number))}[kind]
        return Batch(images, labels, None, jnp.ones((1, number)), keys, zero, zero, zero[:, 0], logits)

    return jax.eval_shape(call, jax.random.key(0), frozen, jax.eval_shape(batch), numbers)
