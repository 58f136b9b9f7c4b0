"""What is minimised. To add a loss, write a function like `cross_entropy` and put it into `LOSSES`.

A loss is called once for each trial and step, with this device's share of the batch:

    loss(forward, batch, **options) -> losses, values

Args:
  forward: function `(images, keys, noise=None) -> logits [b, classes]` float32 (of `cross_entropy`
    more classes than the task has, see `heads`; of any other loss the task's own): merges, applies the
    model with drop path from these keys, and with a `change.Noise` on what was changed. It may be
    called more than once, and on some of the images. With `exits=True` it returns what
    `models.exits.apply` does.
  batch: the `Batch`.
  **options: `config.loss_kwargs`. Real numbers are traced, so that runs which differ in them train
    together; the rest is fixed.

Returns:
  The loss of each image [b], and a dict of other values of each image [b], whose means are reported
  as `train_<name>`: "acc", and what else there is to see. The step multiplies by the mask, and divides
  by the number of images in the batch over all devices. A value named "remember" [b, classes] is not
  reported, but comes back as `batch.remembered` when the same images are in a batch again.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlrr_jax.change import Noise
from rlrr_jax.errors import UserError, unknown


class Batch(NamedTuple):
    """A device's share of a batch, b images of B.

    Attributes:
      images: pixels in [-1, 1], [b, H, W, 3].
      labels: classes [b].
      targets: probabilities [b, classes] where labels are mixed or smoothed, else None.
      mask: 1 for an image, 0 for padding [b].
      keys: a noise key for each image [b].
      slots: place of each image in the whole batch [b].
      numbers: number of each image in the training set [b].
      step: number of the step, from the start of training.
      remembered: what the loss returned as "remember" of each image last [b, classes], 0 at first;
        None for a loss that returns no such value.
    """

    images: jax.Array
    labels: jax.Array
    targets: jax.Array | None
    mask: jax.Array
    keys: jax.Array
    slots: jax.Array
    numbers: jax.Array
    step: jax.Array
    remembered: jax.Array | None = None


Forward = Callable[..., jax.Array]
Values = tuple[jax.Array, dict[str, jax.Array]]
Loss = Callable[..., Values]


def cross_entropy(forward: Forward, batch: Batch) -> Values:
    """Softmax cross-entropy, and whether the answer is right."""
    logits = forward(batch.images, batch.keys)
    losses = cross_entropies(logits, batch)
    return losses, {"acc": correct(logits, batch.labels, losses)}


def cross_entropies(logits: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy of each image [b] to its label, or to its targets."""
    if batch.targets is None:
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return optax.softmax_cross_entropy(logits, batch.targets)


def correct(logits: jax.Array, labels: jax.Array, losses: jax.Array) -> jax.Array:
    """Whether each answer is right [b]; with a loss that is not finite it is not."""
    return (logits.argmax(-1) == labels) & jnp.isfinite(losses)  # of NaN, argmax is class 0


# PACE -----------------------------------------------------------------------------------------


def pace(forward: Forward, batch: Batch, lam: float = 1.0, sigma: float = 1.0) -> Values:
    """Consistency of two passes with different noise on what was changed (PACE, section 3).

    Cross-entropy of the first, plus `lam` times the squared distance of their logits, summed over
    classes. Both have the same drop path. A step costs about four plain ones.

    Args:
      lam: weight of the distance.
      sigma: standard deviation of the noise in the second block, see `change.Noise`.
    """
    first, second = (forward(batch.images, batch.keys, _noise(batch, i, sigma)) for i in range(2))
    return _consistent(first, second, batch, lam)


def pace_lazy(
    forward: Forward, batch: Batch, lam: float = 1.0, sigma: float = 1.0, every: int = 2
) -> Values:
    """PACE of half the images in every k-th step, cross-entropy with noise alone in the others.

    A step costs about two plain ones. The half is every second image of the batch, where the
    authors take the first half: the order is random.

    Args:
      lam: weight of the distance.
      sigma: standard deviation of the noise.
      every: k.
    """

    def half(batch: Batch) -> Values:
        here, rows = _every_second(batch)
        losses, values = pace(forward, here, lam, sigma)
        total, mine = jax.lax.psum((batch.mask.sum(), here.mask.sum()), "data")
        spread = lambda x: jnp.zeros(len(batch.mask)).at[rows].add(x * here.mask) * (total / mine)
        return spread(losses), {name: spread(x) for name, x in values.items()}

    def whole(batch: Batch) -> Values:
        logits = forward(batch.images, batch.keys, _noise(batch, 0, sigma))
        losses, values = _consistent(logits, logits, batch, lam)
        return losses, {name: x.astype(jnp.float32) for name, x in values.items()}

    return jax.lax.cond(batch.step % every == 0, half, whole, batch)


def pace_fast(forward: Forward, batch: Batch, lam: float = 0.1, sigma: float = 1.0) -> Values:
    """PACE to the logits that the same image had an epoch ago, which are 0 before the first.

    A step costs about two plain ones; the table of logits lies on the device.

    Args:
      lam: weight of the distance; smaller than that of `pace`, as its authors advise.
      sigma: standard deviation of the noise; larger.
    """
    logits = forward(batch.images, batch.keys, _noise(batch, 0, sigma))
    assert batch.remembered is not None
    losses, values = _consistent(logits, batch.remembered, batch, lam)
    return losses, {**values, "remember": logits}


def _noise(batch: Batch, number: int, sigma: Any) -> Noise:
    """The noise of a pass over the batch."""
    fold = lambda key: jax.random.fold_in(key, 2**16 + number)  # drop path has smaller numbers
    return Noise(jax.vmap(fold)(batch.keys), sigma)


def _consistent(first: jax.Array, second: jax.Array, batch: Batch, lam: Any) -> Values:
    """Cross-entropy of the first logits, and their weighted distance to the second."""
    losses = cross_entropies(first, batch)
    distance = jnp.square(first - second).sum(-1)
    values = {"acc": correct(first, batch.labels, losses), "distance": distance}
    return losses + lam * distance, values


def _every_second(batch: Batch) -> tuple[Batch, jax.Array]:
    """The images in even places of the whole batch, on however many devices, and their rows."""
    number = len(batch.mask)
    rows = 2 * jnp.arange(-(-number // 2)) + batch.slots[0] % 2
    there = rows < number
    rows = jnp.minimum(rows, number - 1)
    arrays = {name: x[rows] for name, x in batch._asdict().items() if x is not None and name != "step"}
    return batch._replace(**{**arrays, "mask": arrays["mask"] * there}), rows


# Early exits ----------------------------------------------------------------------------------


def exits(
    forward: Forward, batch: Batch, early: float = 1.0, distill: float = 1.0, graph: float = 0.1
) -> Values:
    """Cross-entropies of all exits of a ViT, distillation from the last, and a graph of labels.

    That is, of an image: the cross-entropy of the whole network, plus means over the early exits of
    `early` times theirs, `distill` times the Kullback-Leibler divergence from the last's probabilities
    (which get no gradient), and `graph` times the mean square of the difference of its features to
    those of the other images of its label in the batch, over all devices (where images are mixed, its
    own label, not its partner's). MET (Liu et al., 2024, see
    `methods/met.py`) has the graph; its exact form is not public, and this is ours.

    Args:
      early: weight of the early exits' cross-entropies.
      distill: weight of the divergences.
      graph: weight of the differences of features.
    """
    every, features = forward(batch.images, batch.keys, exits=True)
    losses = jax.vmap(cross_entropies, (1, None), 1)(every, batch)  # [b, E + 1]
    wanted = jax.lax.stop_gradient(jax.nn.log_softmax(every[:, -1]))[:, None]
    found = jax.nn.log_softmax(every[:, :-1])
    divergence = (jnp.exp(wanted) * (wanted - found)).sum(-1)
    distance = _to_own_class(features, batch)
    right = jax.vmap(correct, (1, None, 1), 1)(every, batch.labels, losses)
    values = {
        "acc": right[:, -1],
        "early_acc": right[:, :-1].mean(1),
        "distance": distance,
    }
    extra = (early * losses[:, :-1] + distill * divergence).mean(1)
    return losses[:, -1] + extra + graph * distance, values


def _to_own_class(features: jax.Array, batch: Batch) -> jax.Array:
    """Mean square [b] of the difference of features [b, E, D] to those of other images of the label."""
    mine = features, batch.labels, batch.mask, batch.slots
    others, labels, mask, slots = jax.lax.all_gather(mine, "data", tiled=True)
    alike = (batch.labels[:, None] == labels[None]) & (batch.slots[:, None] != slots[None])
    weight = alike * mask[None]
    # By |a|^2 - 2ab + |b|^2, so that no array [b, B, E, D] is made.
    flat, rest = features.reshape(len(features), -1), others.reshape(len(others), -1)
    squares = jnp.square(flat).sum(1)[:, None] + jnp.square(rest).sum(1)[None]
    squares = (squares - 2 * jnp.matmul(flat, rest.T, precision="highest")) / flat.shape[1]
    return (weight * squares).sum(1) / jnp.maximum(weight.sum(1), 1)


# Names ----------------------------------------------------------------------------------------

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "pace": pace,
    "pace_lazy": pace_lazy,
    "pace_fast": pace_fast,
    "exits": exits,
}
_CHECKED: set[tuple] = set()  # losses with their options and classes, see `check_contract`


def options(name: str) -> dict[str, Any]:
    """A loss's options and their defaults."""
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    parameters = list(inspect.signature(LOSSES[name]).parameters.values())[2:]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
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


def check_contract(name: str, given: dict[str, Any], classes: int) -> None:
    """UserError unless a loss returns what this module says, of two images.

    Args:
      name: of the loss.
      given: all its options.
      classes: number of classes of the logits.
    """
    key, number = (LOSSES[name], repr(sorted(given.items())), classes), 2
    if key in _CHECKED:
        return
    try:
        losses, values = _traced(LOSSES[name], number, classes, given)
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
    if "acc" not in values or "loss" in values:
        raise UserError(f"loss {name!r} must return the value 'acc', and none of name 'loss'")
    _CHECKED.add(key)


def fixed(given: dict[str, Any]) -> dict[str, Any]:
    """The options that are in the program: all but real numbers, which are traced."""
    return {key: value for key, value in given.items() if not isinstance(value, float)}


def outputs(loss: Loss, classes: int) -> set[str]:
    """Names of the values that a loss returns besides itself, without computing anything.

    Args:
      loss: the loss with its fixed options.
      classes: number of classes of the logits.
    """
    return set(_traced(loss, 1, classes)[1])


def _traced(loss: Loss, number: int, classes: int, given: dict[str, Any] | None = None) -> Values:
    """Shapes of what a loss returns for so many images, on one device.

    Args:
      loss: the loss, with its options unless they are given.
      number: number of images.
      classes: number of classes of the logits.
      given: options; real numbers are traced, as in the step.
    """
    given = given or {}
    loss = functools.partial(loss, **fixed(given))
    numbers = {key: jnp.float32(x) for key, x in given.items() if isinstance(x, float)}

    def forward(images: jax.Array, keys: Any, noise: Any = None, exits: bool = False) -> Any:
        logits = jnp.zeros((len(images), classes))
        return (logits[:, None].repeat(2, 1), logits[:, None]) if exits else logits

    def call(batch: Batch, numbers: dict[str, jax.Array]) -> Values:
        one = lambda b: loss(forward, b, **numbers)
        return jax.tree.map(lambda x: x[0], jax.vmap(one, axis_name="data")(batch))

    def batch() -> Batch:  # a device's
        image, zero = jnp.zeros((1, number, 1, 1, 3)), jnp.zeros((1, number), jnp.int32)
        keys, logits = jax.random.split(jax.random.key(0), (1, number)), jnp.zeros((1, number, classes))
        return Batch(image, zero, None, jnp.ones((1, number)), keys, zero, zero, zero[:, 0], logits)

    return jax.eval_shape(call, jax.eval_shape(batch), numbers)
