"""The resize on the device against Pillow itself."""

import jax
import numpy as np
import pytest
from marks import quick
from PIL import Image

from rlrr_jax.data import resize


def pictures(height, width):
    """Noise, hard edges (which overshoot) and flat grey."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (6, height, width, 3), np.uint8)
    edges = rng.integers(0, 2, (6, height, width, 3)).astype(np.uint8) * 255
    return np.concatenate([noise, edges, np.full((1, height, width, 3), 127, np.uint8)])


@pytest.mark.parametrize("size", quick([224, 384], 224))
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (96, 96), (8, 8), (223, 223), (30, 70)])
def test_bit_equal_to_pillow(shape, size):
    images = pictures(*shape)
    pillow = [Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC) for x in images]
    ours = jax.jit(resize.bicubic, static_argnums=1)(images, size)
    np.testing.assert_array_equal(ours, np.stack([np.asarray(p) for p in pillow]))


def test_right_size_is_left_alone_and_shrinking_refused():
    images = pictures(32, 32)
    assert resize.bicubic(images, 32) is images
    with pytest.raises(ValueError, match="cannot be enlarged to 16"):
        resize.bicubic(images, 16)


def test_jax_image_resize_would_not_do():
    """Why this file is there."""
    images = pictures(32, 32)
    theirs = jax.image.resize(images.astype(np.float32), (len(images), 224, 224, 3), "bicubic")
    theirs = np.clip(np.round(theirs), 0, 255)
    ours = np.asarray(resize.bicubic(images, 224), np.float32)
    assert np.abs(ours - theirs).max() > 10
