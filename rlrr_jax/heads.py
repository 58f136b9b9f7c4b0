"""One size of head for the tasks of a start, so that those with other classes share programs.

The classes beyond a task's own have kernels of 0 and a bias of `NEVER`, so that softmax gives them
exactly 0: the loss, its gradients and the answers are those of a head of the task's size, with sums in
another order. A single task, and any loss but plain cross-entropy, has heads of its own size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax import losses
from rlrr_jax.run_images import task_of

NEVER = -1e9  # bias of a class that there is not


def share(runs: list) -> None:
    """Sets `head_classes` of the runs of a start that can share a program, if it has several tasks."""
    alike = [run for run in runs if _plain(run)]
    if len({run.task for run in alike}) > 1:
        most = max(task_of(run).classes for run in alike)
        for run in alike:
            run.head_classes = most


def _plain(run: Any) -> bool:
    """Whether nothing but plain cross-entropy sees a run's logits."""
    plain = losses.find(run.loss).function is losses.cross_entropy
    others = run.label_smoothing or run.get("gradients") or run.get("class_weights")
    return plain and not others


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


def scaled(trained: Any, temperature: float, unit: tuple[float, float]) -> Any:
    """A trained tree whose head gives logits divided by a temperature, or values in their own unit.

    Args:
      trained: the tree, on the host.
      temperature: what logits are divided by.
      unit: deviation and mean of values, (1, 0) of all else.
    """
    deviation, mean = unit
    if temperature == 1 and (deviation, mean) == (1, 0):
        return trained
    factor, head = np.float64(deviation / temperature), trained["head"]
    kernel, bias = head["kernel"] * factor, head["bias"] * factor + mean
    return {**trained, "head": {"kernel": np.float32(kernel), "bias": np.float32(bias)}}


def cut(trained: Any, classes: int) -> Any:
    """A trained tree with a head of a number of classes."""
    if trained["head"]["bias"].shape[-1] == classes:
        return trained
    return {**trained, "head": jax.tree.map(lambda x: x[..., :classes], trained["head"])}
