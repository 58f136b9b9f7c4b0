"""Decoding and resizing against Pillow itself and against a second formulation of bicubic."""

import io

import numpy as np
import pytest
from PIL import Image

from rlrr_jax.data import store


def encoded(image, kind, mode="RGB"):
    out = io.BytesIO()
    Image.fromarray(image).convert(mode).save(out, kind)
    return out.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def bicubic(image, size):
    """Antialiased bicubic interpolation with a = -0.5, written out, rounded after each pass."""

    def weights(n):
        scale = max(n / size, 1.0)
        center = (np.arange(size) + 0.5) * n / size
        x = np.abs((np.arange(n) + 0.5 - center[:, None]) / scale)
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        w = np.where(x < 1, near, np.where(x < 2, far, 0))
        return w / w.sum(1, keepdims=True)

    height, width, _ = image.shape
    rows = np.clip(np.round(np.einsum("sw,hwc->hsc", weights(width), image)), 0, 255)
    return np.clip(np.round(np.einsum("sh,hwc->swc", weights(height), rows)), 0, 255)


@pytest.mark.parametrize("shape", [(40, 70), (16, 16), (300, 200)])
def test_resize_is_pillows_antialiased_bicubic_without_cropping(shape):
    image = noise(*shape, 3)
    ours = store.decode(encoded(image, "PNG"), 32)
    pillow = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(ours, pillow)
    assert np.abs(ours.astype(int) - bicubic(image.astype(float), 32)).max() <= 1


def test_right_size_is_left_alone():
    image = noise(32, 32, 3)
    np.testing.assert_array_equal(store.decode(encoded(image, "PNG"), 32), image)


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "CMYK")]
)
def test_every_mode_becomes_rgb(kind, mode):
    data = encoded(noise(32, 32, 3), kind, mode)
    out = store.decode(data, 32)
    assert out.shape == (32, 32, 3)
    np.testing.assert_array_equal(out, Image.open(io.BytesIO(data)).convert("RGB"))


def test_arrays_of_one_and_three_channels():
    grey = noise(32, 32)
    np.testing.assert_array_equal(store.decode(grey, 32), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(store.decode(noise(32, 32, 3), 32), noise(32, 32, 3))
