"""Pillow's bicubic resize on the device, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax.sides import Size, pair, text

_BITS = 22  # of a weight after the point, Pillow's PRECISION_BITS
_HALF = 11
_AT_ONCE = 64  # images, whose steps between are 8 times as large as they are


@functools.cache
def weights(old: int, new: int) -> np.ndarray:
    """Pillow's integer weights [new, old] for bicubic interpolation of 8-bit images.

    Source: precompute_coeffs and normalize_coeffs_8bpc of Pillow's src/libImaging/Resample.c.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    center = (np.arange(new) + 0.5)[:, None] * scale
    first = np.maximum((center - 2 * stretch + 0.5).astype(int), 0)
    last = np.minimum((center + 2 * stretch + 0.5).astype(int), old)
    pixel = np.arange(old)
    x = np.abs((pixel - center + 0.5) / stretch)
    near = (1.5 * x - 2.5) * x * x + 1
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    w = np.where(x < 1, near, np.where(x < 2, far, 0)) * ((pixel >= first) & (pixel < last))
    w = w / w.sum(1, keepdims=True) * (1 << _BITS)
    return np.trunc(w + np.copysign(0.5, w)).astype(np.int32)


def bicubic(images: jax.Array, size: Size) -> jax.Array:
    """Images [B, H, W, 3] uint8 to [B, height, width, 3] uint8, enlarged, as Pillow does it.

    Rows and then columns, each a product with a matrix that is rounded to 8 bits. The integer weights
    are split into halves of 11 bits, so that float32 products and sums of them are exact. Images of
    that size are returned as they are. Raises ValueError for images that would have to shrink.
    """
    height, width = pair(size)
    if images.shape[1:3] == (height, width):
        return images
    if images.shape[1] > height or images.shape[2] > width:
        raise ValueError(f"images of {images.shape[1:3]} cannot be enlarged to {text(size)}")
    wide = _pass("ow,bhwc->bhoc", weights(images.shape[2], width), images)
    return _pass("oh,bhwc->bowc", weights(images.shape[1], height), wide)


@functools.partial(jax.jit, static_argnums=1)
def enlarge(images: jax.Array, size: Size) -> jax.Array:
    """`bicubic` as a program of its own, so that what comes after has one for all sizes of images."""
    return bicubic(images, size)


@functools.partial(jax.jit, static_argnums=1)
def enlarge_all(images: jax.Array, size: Size) -> jax.Array:
    """`enlarge` for many images, which takes the memory of a few."""
    return jax.lax.map(lambda image: bicubic(image[None], size)[0], images, batch_size=_AT_ONCE)


def normalize(images: jax.Array, size: Size, crop_from: int | None = None) -> jax.Array:
    """Images uint8 [B, h, w, 3] to float32 [B, height, width, 3] in [-1, 1].

    Args:
      images: images to enlarge, if they are smaller.
      size: size of the result in pixels, see `sides`.
      crop_from: side from whose middle it is cut; None cuts nothing off.
    """
    whole = bicubic(images, crop_from or size)
    height, width = pair(size)
    top, left = (whole.shape[1] - height) // 2, (whole.shape[2] - width) // 2
    middle = whole[:, top : top + height, left : left + width]
    return middle.astype(jnp.float32) / 127.5 - 1.0


def _pass(spec, w, images):
    dot = functools.partial(jnp.einsum, spec, precision=jax.lax.Precision.HIGHEST)
    high, low = (
        dot(part.astype(np.float32), images.astype(jnp.float32)).astype(jnp.int32)
        for part in (w >> _HALF, w & (1 << _HALF) - 1)
    )
    rounded = (high << _HALF) + low + (1 << _BITS - 1) >> _BITS
    return jnp.clip(rounded, 0, 255).astype(jnp.uint8)
