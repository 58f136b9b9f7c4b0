"""One size of head for all tasks: those that differ in their classes share a program.

The classes beyond a task's own have kernels of 0 and a bias of `NEVER`, so that softmax gives them
exactly 0: the loss, its gradients and the answers are those of a head of the task's size, with sums in
another order. Where more than plain cross-entropy sees the logits, a head has the task's own size.
"""

from typing import Any

import jax
import jax.numpy as jnp

STEP = 512  # a head has a multiple of so many classes
NEVER = -1e9  # bias of a class that there is not


def padded(run: Any, classes: int) -> int:
    """Number of classes of a run's head while it trains.

    Args:
      run: the configuration.
      classes: number of classes of its task.
    """
    plain = run.loss == "cross_entropy" and not run.label_smoothing
    if not plain or run.get("gradients") is not None or run.model.exits:
        return classes
    return -(-classes // STEP) * STEP


@jax.jit
def _hidden(bias: jax.Array, classes: int) -> jax.Array:
    return jnp.where(jnp.arange(bias.shape[-1]) < classes, bias, NEVER)


def hide(trained: Any, classes: int) -> Any:
    """Trained trees [T, ...] at their start, with the bias `NEVER` of classes beyond a number."""
    head = trained["head"]
    if head["bias"].shape[-1] == classes:
        return trained
    bias = jax.device_put(_hidden(head["bias"], classes), head["bias"].sharding)
    return {**trained, "head": {**head, "bias": bias}}


def cut(trained: Any, classes: int) -> Any:
    """A trained tree with a head of a number of classes."""
    if trained["head"]["bias"].shape[-1] == classes:
        return trained
    return {**trained, "head": jax.tree.map(lambda x: x[..., :classes], trained["head"])}
