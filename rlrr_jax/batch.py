"""This device's share of a batch: which images it is, augmented and mixed on the device.

Noise is keyed by an image's place in the whole batch, so that it does not depend on the devices.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax import mixing
from rlrr_jax.data.resize import normalize
from rlrr_jax.recipe import Batch, Hyper, Recipe


def take(recipe: Recipe, data: Any, order: jax.Array, state: Any, hyper: Hyper, now: tuple) -> Batch:
    """This device's share of a batch; slots beyond the batch or the data have mask 0.

    Args:
      recipe: the `Recipe`.
      data: images and labels, see `step.train_steps`.
      order: rows of `data` in the order of the epoch [N].
      state: see `step.init_state`.
      hyper: hyper-parameters and keys.
      now: epoch and step.
    """
    epoch, step = now
    parts = jax.lax.axis_size("data") * recipe.accumulate
    local = math.ceil(recipe.batch_size / parts) * recipe.accumulate
    slots = jax.lax.axis_index("data") * local + jnp.arange(local)  # in the global batch
    first, last = step * recipe.batch_size, recipe.num_images - 1
    mask = (slots < recipe.batch_size) & (first + slots <= last)
    rows = order[jnp.minimum(first + slots, last)]
    step_key = jax.random.fold_in(hyper.noise_key, epoch * recipe.steps + step)
    keys = keys_of(step_key, slots)
    numbers = data["numbers"][rows] if "numbers" in data else rows
    remembered = state.get("remembered")
    batch = Batch(
        images=augment(recipe, data["images"][rows], keys, hyper.flip),
        labels=data["labels"][rows],
        targets=None,
        mask=mask.astype(jnp.float32),
        keys=keys,
        slots=slots,
        numbers=numbers,
        step=epoch * recipe.steps + step,
        remembered=None if remembered is None else remembered[numbers],
    )
    if recipe.mixing == mixing.Mixing():
        return batch
    others = jnp.minimum(recipe.batch_size, recipe.num_images - first) - 1 - slots
    partners = order[jnp.clip(first + others, first, last)]
    return mixed(recipe, data, hyper, batch, (others, partners, step_key))


def keys_of(step_key: jax.Array, slots: jax.Array) -> jax.Array:
    """The noise key of each image [b], by its place in the batch."""
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(slots)


def augment(recipe: Recipe, images: jax.Array, keys: jax.Array, flip: jax.Array) -> jax.Array:
    """Stored images [b, h, w, 3] as the model takes them, in [-1, 1]; with `flip`, flipped by key.

    Of outputs of first blocks [b, F, ...], see `prefix`, those of the image or of the flipped one.
    """
    flips = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 0)))(keys) & flip
    if recipe.image_size is None:
        return images[jnp.arange(len(images)), flips.astype(jnp.int32)]
    size = recipe.crop_from or recipe.image_size
    images = normalize(images, size)
    if size != recipe.image_size:
        assert isinstance(recipe.image_size, int)  # squares are cut
        images = jax.vmap(functools.partial(_crop, recipe.image_size))(images, keys)
    return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def _crop(size: int, image: jax.Array, key: jax.Array) -> jax.Array:
    """A square of an image [H, W, 3] in a random place."""
    corner = jax.random.randint(jax.random.fold_in(key, 2**17), (2,), 0, len(image) - size + 1)
    return jax.lax.dynamic_slice(image, (*corner, 0), (size, size, 3))


def mixed(recipe: Recipe, data: Any, hyper: Hyper, batch: Batch, pairs: tuple) -> Batch:
    """A batch mixed with partners, which other devices may have, and its targets.

    Args:
      recipe: the `Recipe`.
      data: images and labels.
      hyper: hyper-parameters and keys.
      batch: the batch before.
      pairs: places in the batch [b] and rows of `data` [b] of the partners, and the step's key.
    """
    others, partners, step_key = pairs
    how, images, weight = recipe.mixing, batch.images, 1.0
    if how.images:
        second = augment(recipe, data["images"][partners], keys_of(step_key, others), hyper.flip)
        one = jax.random.fold_in(step_key, 2**31 - 1)  # of the batch; images have smaller numbers
        images, weight = mixing.mix(how, one, images, second)
    labels = batch.labels, data["labels"][partners]
    targets = mixing.targets(how, *labels, weight, recipe.model.num_classes)
    return batch._replace(images=images, targets=targets)
