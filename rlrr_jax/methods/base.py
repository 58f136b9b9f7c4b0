"""What a fine-tuning method is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Method(NamedTuple):
    """A re-parameterisation of a ViT's weights.

    Attributes:
      init: `(key, frozen) -> trainable`, the tree that is trained, with `head/{kernel,bias}` in it;
        works under `jax.eval_shape`.
      merge: `(frozen, trainable) -> params`, a plain ViT tree again; pure and differentiable.
      decay: `trainable -> tree of bools`, which leaves get weight decay.
      DEFAULTS: the method's own `lr`, `weight_decay` and `drop_path`, used where neither the config
        nor the task's recipe says otherwise.
    """

    init: Callable[[jax.Array, Any], Any]
    merge: Callable[[Any, Any], Any]
    decay: Callable[[Any], Any]
    DEFAULTS: dict


def trainable_count(trainable):
    """Number of trained values outside the head."""
    return sum(x.size for x in jax.tree.leaves(trainable)) - head_count(trainable)


def head_count(trainable):
    """Number of trained values in the head."""
    return sum(x.size for x in jax.tree.leaves(trainable["head"]))
