"""What is minimised. To add a loss, write a function like `cross_entropy` and put it into `LOSSES`.

A loss is called once for each trial and step, with this device's share of the batch:

    loss(forward, labels, mask, keys) -> losses, metrics

Args:
  forward: function `keys -> logits [b, classes]` float32: merges, applies the model with drop path
    from these keys. It may be called more than once; None instead of keys means no noise.
  labels: classes [b].
  mask: 1 for an image, 0 for padding [b].
  keys: a noise key for each image [b], None where the run has no noise.

Returns:
  The loss of each image [b], and a dict of other values of each image [b], whose means are reported
  as `train_<name>`. The step multiplies by the mask, and divides by the number of images in the batch
  over all devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlrr_jax.errors import unknown

Forward = Callable[[jax.Array | None], jax.Array]
Loss = Callable[
    [Forward, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]
]


def cross_entropy(
    forward: Forward, labels: jax.Array, mask: jax.Array, keys: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Softmax cross-entropy, and whether the answer is right."""
    logits = forward(keys)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, {"acc": correct(logits, labels, losses)}


def correct(logits: jax.Array, labels: jax.Array, losses: jax.Array) -> jax.Array:
    """Whether each answer is right [b]; with a loss that is not finite it is not."""
    return (logits.argmax(-1) == labels) & jnp.isfinite(losses)  # of NaN, argmax is class 0


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy}


def get(name: str) -> Loss:
    """The loss of a name; UserError, with the nearest, for an unknown one."""
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    return LOSSES[name]


def metrics(loss: Loss, classes: int) -> tuple[str, ...]:
    """Names of the values a loss returns besides itself, without computing anything."""

    def values(keys: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        return loss(lambda _: jnp.zeros((1, classes)), labels, jnp.ones(1), keys)[1]

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    return tuple(jax.eval_shape(values, keys, jax.ShapeDtypeStruct((1,), jnp.int32)))
