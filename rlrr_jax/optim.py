"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from rlrr_jax import methods
from rlrr_jax.errors import unknown

WARMUP_LR, MIN_LR = 1e-7, 1e-8  # the authors'
SCHEDULES = ("official", "cosine", "bigvision", "restarts")
RESTARTS = (10, 2)  # the authors' for their augmented recipe


class Optimizer(NamedTuple):
    """How gradients become updates.

    Attributes:
      name: "adamw", or "momentum" as big_vision fine-tunes (SGD, momentum 0.9).
      momentum_dtype: dtype in which "momentum" keeps its state.
      grad_clip: largest norm of the whole gradient; None: any.
      gradients: function `key -> optax transformation` of the gradient before all else, made anew with
        each step's own key; None: it stays. It does not see what a method keeps fixed.
      average: decay of a running average of the trained tree, which is evaluated and saved; None: none.
    """

    name: str = "adamw"
    momentum_dtype: str = "bfloat16"
    grad_clip: float | None = None
    gradients: Callable[[jax.Array], optax.GradientTransformation] | None = None
    average: float | None = None


def build(
    optimizer: "Optimizer",
    method: methods.Method,
    trainable: Any,
    lr: Any,
    weight_decay: Any,
    key: jax.Array | None = None,
) -> optax.GradientTransformation:
    """The optax transformation; `lr`, `weight_decay` and `key`, for `gradients`, may be traced."""
    mask = methods.decay(method, trainable)
    if optimizer.name == "adamw":  # as the authors use it
        tx = optax.adamw(lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay, mask=mask)
    elif optimizer.name != "momentum":
        raise unknown("optimizer", optimizer.name, ("adamw", "momentum"))
    else:
        tx = optax.chain(
            optax.trace(0.9, accumulator_dtype=optimizer.momentum_dtype),
            optax.add_decayed_weights(weight_decay, mask=mask),
            optax.scale_by_learning_rate(lr),
        )
    if (clip := optimizer.grad_clip) is not None:
        tx = optax.chain(optax.clip_by_global_norm(clip), tx)
    if optimizer.gradients is None:
        return tx
    first: Any = optimizer.gradients(key)  # type: ignore[arg-type]
    return optax.chain(optax.masked(first, methods.trained(trainable)), tx)


def learning_rates(
    schedule: str,
    lr: Any,
    epochs: int,
    steps: int = 1,
    total_steps: int | None = None,
    warmup: int | None = None,
    restarts: tuple[int, int] | None = None,
) -> list[float]:
    """Learning rate of each step of `epochs` epochs of so many steps, a list of floats.

    Args:
      schedule: "official", what the authors' scheduler really yields: of 110 epochs, 10 of warm-up
        (the first two both at `WARMUP_LR`), a cosine over 100, the last 9 at `MIN_LR`; other numbers
        of epochs are divided in the same way. "cosine", for short runs: an epoch of warm-up in ten,
        then a cosine to almost zero, no epoch wasted. Both have one value an epoch. "bigvision": a
        linear warm-up by steps, which begins at 0, then a cosine to 0 at `total_steps`. "restarts":
        cosines to 0 (Loshchilov and Hutter, ICLR 2017) as the authors' FGVC scripts really yield them,
        one value an epoch, the first epoch twice.
      lr: the largest learning rate.
      warmup: of "bigvision" its steps; of "official" its epochs, and those at the end, None: one in 11.
      restarts: of "restarts" the epochs of the first cosine, and how many times as long each is than
        the one before; None is `RESTARTS`.

    Raises UserError for an unknown schedule.
    """
    if schedule == "bigvision":
        total = total_steps or epochs * steps
        return [_bigvision(i, lr, warmup or 0, total) for i in range(epochs * steps)]
    if schedule == "official":
        warmup = cooldown = epochs // 11 if warmup is None else warmup
        each = [_official(max(e - 1, 0), lr, warmup, epochs - cooldown) for e in range(epochs)]
    elif schedule == "cosine":
        each = [_cosine(e, lr, epochs // 10, epochs) for e in range(epochs)]
    elif schedule == "restarts":
        each = [_restarts(max(e - 1, 0), lr, *(restarts or RESTARTS)) for e in range(epochs)]
    else:
        raise unknown("schedule", schedule, SCHEDULES)
    return [value for value in each for _ in range(steps)]


def _bigvision(t, lr, warmup, total):
    progress = min(max((t - warmup) / max(total - warmup, 1), 0.0), 1.0)
    return lr * 0.5 * (1 + math.cos(math.pi * progress)) * (min(1.0, t / warmup) if warmup else 1.0)


def _official(t, lr, warmup, length):
    if t < warmup:
        return WARMUP_LR + t * (lr - WARMUP_LR) / warmup
    if t >= length:
        return MIN_LR
    return MIN_LR + 0.5 * (lr - MIN_LR) * (1 + math.cos(math.pi * t / length))


def _restarts(t, lr, length, times):
    while t >= length:
        t, length = t - length, length * times
    return lr * 0.5 * (1 + math.cos(math.pi * t / length))


def _cosine(epoch, lr, warmup, epochs):
    if epoch < warmup:
        return lr * (epoch + 1) / (warmup + 1)
    middle = (epoch - warmup + 0.5) / (epochs - warmup)  # of the epoch
    return lr * 0.5 * (1 + math.cos(math.pi * middle))
