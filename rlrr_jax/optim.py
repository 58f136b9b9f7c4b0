"""The optimiser and the learning-rate schedules; one learning rate per epoch."""

import math

import optax

WARMUP_LR, MIN_LR = 1e-7, 1e-8  # the authors'


def adamw(method, trainable, lr, weight_decay):
    """AdamW as the authors use it; `lr` and `weight_decay` may be traced."""
    return optax.adamw(
        lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay, mask=method.decay(trainable)
    )


def learning_rates(schedule, lr, epochs):
    """Learning rate of each of `epochs` epochs, a list of floats.

    Args:
      schedule: "official", what the authors' scheduler really yields: of 110 epochs, 10 of warm-up
        (the first two both at `WARMUP_LR`), a cosine over 100, the last 9 at `MIN_LR`; other numbers
        of epochs are divided in the same way. "cosine", for short runs: an epoch of warm-up in ten,
        then a cosine to almost zero, no epoch wasted.
      lr: the largest learning rate.

    Raises ValueError for an unknown schedule.
    """
    if schedule == "official":
        warmup = cooldown = epochs // 11
        return [_official(max(e - 1, 0), lr, warmup, epochs - cooldown) for e in range(epochs)]
    if schedule == "cosine":
        warmup = epochs // 10
        return [_cosine(e, lr, warmup, epochs) for e in range(epochs)]
    raise ValueError(f"unknown schedule {schedule!r}: use official or cosine")


def _official(t, lr, warmup, length):
    if t < warmup:
        return WARMUP_LR + t * (lr - WARMUP_LR) / warmup
    if t >= length:
        return MIN_LR
    return MIN_LR + 0.5 * (lr - MIN_LR) * (1 + math.cos(math.pi * t / length))


def _cosine(epoch, lr, warmup, epochs):
    if epoch < warmup:
        return lr * (epoch + 1) / (warmup + 1)
    middle = (epoch - warmup + 0.5) / (epochs - warmup)  # of the epoch
    return lr * 0.5 * (1 + math.cos(math.pi * middle))
