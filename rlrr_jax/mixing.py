"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) of a batch, as timm mixes it.

The image in place i of a batch of n is mixed with that in place n - 1 - i, all with one weight. Where
both are on, each batch has one of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Mixing(NamedTuple):
    """How images and labels are mixed.

    Attributes:
      mixup: parameter of the Beta distribution of its weights; 0 is off.
      cutmix: the same of CutMix.
      smoothing: share of each label that is spread over all classes.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0

    @property
    def images(self) -> bool:
        """Whether images are mixed, not only labels smoothed."""
        return self.mixup > 0 or self.cutmix > 0


def mix(how: Mixing, key: jax.Array, images: jax.Array, partners: jax.Array) -> tuple:
    """Mixed images [b, H, W, 3], and the weight of their own labels.

    Args:
      how: the `Mixing`.
      key: the same for all images of a batch.
      images: pixels [b, H, W, 3].
      partners: the images they are mixed with.
    """
    which, weight, box = jax.random.split(key, 3)
    cut = bool(how.cutmix) if not (how.mixup and how.cutmix) else jax.random.bernoulli(which)
    alpha = jnp.where(cut, how.cutmix or 1.0, how.mixup or 1.0)
    share = jax.random.beta(weight, alpha, alpha)
    inside, area = cut_box(box, share, images.shape[1:3])
    blended = images * share + partners * (1 - share)
    pasted = jnp.where(inside[None, :, :, None], partners, images)
    return jnp.where(cut, pasted, blended), jnp.where(cut, 1 - area, share)


def cut_box(key: jax.Array, share: jax.Array, size: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Whether each pixel [H, W] lies in a box of `1 - share` of the area, and the box's true share.

    Its centre is uniform, and what sticks out of the image is cut off.
    """
    sides, edges = jnp.sqrt(1 - share) * jnp.array(size), []
    for k, (side, length) in enumerate(zip(sides.astype(jnp.int32), size)):
        centre = jax.random.randint(jax.random.fold_in(key, k), (), 0, length)
        edges.append(jnp.clip(jnp.array([centre - side // 2, centre + side // 2]), 0, length))
    (top, bottom), (left, right) = edges
    row, column = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    inside = (top <= row) & (row < bottom) & (left <= column) & (column < right)
    return inside, (bottom - top) * (right - left) / (size[0] * size[1])


def targets(
    how: Mixing, labels: jax.Array, partners: jax.Array, weight: Any, classes: int
) -> jax.Array:
    """Probabilities of the classes [b, classes], smoothed and mixed.

    Args:
      how: the `Mixing`.
      labels: classes [b], or 0 and 1 [b, classes], which are smoothed towards a half.
      partners: those of the images they are mixed with.
      weight: weight of `labels`.
      classes: number of classes.
    """
    hot = lambda x: jax.nn.one_hot(x, classes) if x.ndim == 1 else x
    even = 1 / classes if labels.ndim == 1 else 0.5
    smooth = lambda x: hot(x) * (1 - how.smoothing) + how.smoothing * even
    return weight * smooth(labels) + (1 - weight) * smooth(partners)
