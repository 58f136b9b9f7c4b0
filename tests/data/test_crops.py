"""big_vision's crops against plain loops over pixels."""

import threading

import numpy as np
import pytest

from rlrr_jax.data import crops, decoding


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def area_pixel(image, y, x, sizes):
    """Mean over the part of the image that one pixel of the result covers, subpixel by subpixel."""
    (height, width), parts = sizes, 40
    rows = (y + (np.arange(parts) + 0.5) / parts) * image.shape[0] / height
    columns = (x + (np.arange(parts) + 0.5) / parts) * image.shape[1] / width
    return image[rows.astype(int)][:, columns.astype(int)].astype(float).mean((0, 1))


def bilinear_pixel(image, y, x, size):
    """TensorFlow's definition with half-pixel centres, clamped at the border, no antialiasing."""
    out = np.zeros(3)
    places = [min(max((i + 0.5) * n / size - 0.5, 0), n - 1) for i, n in zip((y, x), image.shape[:2])]
    for dy in (0, 1):
        for dx in (0, 1):
            i, j = int(places[0]) + dy, int(places[1]) + dx
            weight = (1 - abs(places[0] - i)) * (1 - abs(places[1] - j))
            if weight > 0:
                out += weight * image[i, j]
    return out


@pytest.mark.parametrize(("shape", "sizes"), [((40, 30), (27, 20)), ((64, 91), (45, 64))])
def test_window_is_the_area_average(shape, sizes):
    image = noise(*shape)
    shorter = min(sizes)
    assert crops.small(*shape, shorter) == sizes
    ours = crops.window(image, 16, shorter, 3, 2)
    for y, x in ((0, 0), (5, 9), (15, 15)):
        theirs = area_pixel(image, y + 3, x + 2, sizes)
        assert np.abs(ours[y, x] + 0.5 - theirs).max() < 4.5, (y, x)


def test_area_on_a_whole_ratio_is_a_plain_mean_or_copy():
    image = noise(32, 32)
    mean = image.reshape(8, 4, 8, 4, 3).mean((1, 3))
    np.testing.assert_array_equal(crops.window(image, 8, 8, 0, 0), np.floor(mean + 1e-3))
    large = crops.window(image, 384, 448, 10, 20)  # big_vision's CIFAR: 32 to 448 is 14 times
    copied = image.repeat(14, 0).repeat(14, 1)[10:394, 20:404]
    np.testing.assert_array_equal(large, copied)


def test_area_matrices_keep_the_brightness():
    for source, target in ((500, 448), (32, 448), (333, 448), (3, 7)):
        matrix = crops.area(0, target, source, target)
        np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose(matrix.sum(0), target / source, rtol=1e-4)


@pytest.mark.parametrize("shape", [(50, 70), (9, 13), (24, 24)])
def test_bilinear_equals_the_definition(shape):
    image = noise(*shape)
    size = 24
    matrices = (crops.bilinear(n, size) for n in shape)
    ours = crops.resample(image, *matrices)
    for y in range(0, size, 5):
        for x in range(0, size, 3):
            theirs = bilinear_pixel(image, y, x, size)
            assert np.abs(ours[y, x] - np.floor(theirs + 1e-3)).max() <= 1


def test_central_is_the_middle():
    image = noise(40, 60)
    middle = crops.window(image, 24, 32, (32 - 24) // 2, (48 - 24) // 2)
    np.testing.assert_array_equal(crops.central(image, 24, 32), middle)
    np.testing.assert_array_equal(decoding.decode(image, decoding.Pixels(24, shorter=32)), middle)


def test_inception_boxes_lie_in_the_image_and_have_the_asked_area_and_aspect():
    rng = np.random.default_rng(0)
    boxes = np.array([crops.inception_box(rng, 60, 90) for _ in range(3000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 60).all() and (left + width <= 90).all()
    share = height * width / (60 * 90)
    assert share.min() >= 0.05 and share.max() > 0.8
    # Of whole pixels: within half a pixel of the drawn ratio.
    assert ((width + 0.5) / height >= 0.75).all() and ((width - 0.5) / (height + 1) <= 1.33).all()
    # Uniform in height, so small areas are less frequent than under a uniform area's square root law.
    assert len(np.unique(top)) > 30 and len(np.unique(left)) > 50


def test_an_impossible_box_is_the_whole_image():
    assert crops.inception_box(np.random.default_rng(0), 2, 400) == (0, 0, 2, 400)


@pytest.mark.parametrize("kind", crops.KINDS)
def test_crops_go_by_seed_epoch_and_image(kind):
    images, pixels = [noise(30, 40, i) for i in range(6)], decoding.Pixels(16, shorter=20)
    make = lambda seed=0: crops.Crops(images.__getitem__, 6, kind, pixels, seed)
    first, again, other = (make().take(epoch, range(6)) for epoch in (0, 0, 1))
    assert first.shape == (6, 16, 16, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3)).all()
    assert (first != make(1).take(0, range(6))).any(axis=(1, 2, 3)).all()
    some = crops.Crops(lambda i: images[i], 6, kind, pixels, 0).take(0, [2, 0])
    np.testing.assert_array_equal(some, first[[2, 0]])


def test_random_crop_reaches_every_place():
    rng = np.random.default_rng(0)
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(8)[:, None], np.arange(8)
    places = {tuple(crops.random_crop(rng, image, 6, 8)[0, 0, :2]) for _ in range(200)}
    assert places == {(i, j) for i in range(3) for j in range(3)}


def test_a_training_that_ends_cancels_its_own_crops_alone():
    """The next one that uses the same crops gets them, not black images."""
    made = crops.Crops(lambda i: noise(30, 40, i), 4, "resmall", decoding.Pixels(16, shorter=20), 0)
    cancelled = threading.Event()
    cancelled.set()
    assert not made.take(0, range(4), cancelled).any()
    assert (made.take(0, [1]) == made.take(0, [1], threading.Event())).all() and made.take(0, [1]).any()
