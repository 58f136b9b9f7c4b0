"""How much a loss without a head depends on each pretrained weight: what GPS chooses weights by."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax import models
from rlrr_jax.data.resize import enlarge, normalize
from rlrr_jax.errors import UserError
from rlrr_jax.methods import Training

TEMPERATURE = 0.07  # of the authors of the loss


def contrastive(features: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """The supervised contrastive loss (Khosla et al., NeurIPS 2020, their L_out), a mean over images.

    Args:
      features: vectors [n, D], of any length.
      labels: classes [n].
      mask: 1 for an image, 0 for padding [n].
    """
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError("method gps compares images of one class each: take another method")
    features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    logits = features @ features.T / TEMPERATURE
    others = mask[None] * (1 - jnp.eye(len(labels)))
    log_sum = jax.nn.logsumexp(jnp.where(others > 0, logits, -jnp.inf), axis=1, keepdims=True)
    same = others * (labels[:, None] == labels[None])
    number = same.sum(1)
    each = -(jnp.where(same > 0, logits - log_sum, 0).sum(1)) / jnp.maximum(number, 1)
    counted = mask * (number > 0)
    return (each * counted).sum() / jnp.maximum(counted.sum(), 1)


def gradient(training: Training) -> Any:
    """The gradient of the contrastive loss, summed over batches: a tree like the frozen one.

    The two views of an image are the image and its mirror image.
    """
    frozen = training.frozen
    size, crop_from = training.pixels
    add = program(training.model, size, crop_from, training.precision)
    total = jax.tree.map(jnp.zeros_like, frozen)
    for images, *rest in training.batches():
        images = enlarge(images, crop_from or size)  # one program for all sizes
        total = add(total, frozen, images, *rest)
    return total


@functools.lru_cache(8)
def program(model: Any, size: Any, crop_from: int | None, precision: str) -> Callable:
    """A jitted function `(total, params, images, labels, mask) -> total` that adds a gradient."""

    def loss(params: Any, images: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
        pixels = normalize(images, size, crop_from)
        views = jnp.concatenate([pixels, pixels[:, :, ::-1]])
        features = models.head_inputs(model, params, views).astype(jnp.float32)
        return contrastive(features, jnp.tile(labels, 2), jnp.tile(mask, 2))

    def add(total: Any, params: Any, *batch: jax.Array) -> Any:
        with jax.default_matmul_precision(precision):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, *batch))

    return jax.jit(add)
