"""big_vision's random crops (configs/transfer.py, pp/ops_image.py), made on the host in NumPy.

All pixels are what TensorFlow's resizes without antialiasing give, cut off to whole numbers as
big_vision does, since Pillow's filters are others.
"""

import copy
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SQUARE = "square"  # of the whole image as a square: cut on the device, see `batch.augment`
KINDS = ("resmall", "inception", SQUARE)


def by_host(kind: str | None) -> bool:
    """Whether crops of a kind are made on the host, anew for each epoch."""
    return kind not in (None, SQUARE)


def area(start: Any, stop: Any, source: Any, target: Any) -> np.ndarray:
    """Rows [start, stop) of the matrix [target, source] that averages over equal parts of a side."""
    edges = np.arange(start, stop + 1) * (source / target)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(source)
    overlap = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
    return (np.maximum(overlap, 0) * (target / source)).astype(np.float32)


def bilinear(source: Any, target: Any) -> np.ndarray:
    """The matrix [target, source] that interpolates between the two nearest pixels of a side."""
    place = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    low = np.floor(place).astype(int)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target), low), 1 - (place - low))
    np.add.at(matrix, (np.arange(target), np.minimum(low + 1, source - 1)), place - low)
    return matrix


def resample(image: Any, rows: Any, columns: Any) -> np.ndarray:
    """An image [h, w, 3] uint8 through matrices [H, h] and [W, w]: [H, W, 3] uint8."""
    height, width, channels = image.shape
    out = rows @ image.reshape(height, -1).astype(np.float32)
    out = columns @ out.reshape(-1, width, channels)  # [H, W, 3]
    # A thousandth makes up for rounding errors of sums that are whole numbers.
    return np.clip(out + 1e-3, 0, 255).astype(np.uint8)


def small(height: int, width: int, shorter: int) -> tuple:
    """Size of an image whose shorter side becomes `shorter`, as `resize_small` rounds it."""
    return tuple(round(side * shorter / min(height, width)) for side in (height, width))


def window(image: Any, size: int, shorter: int, top: Any, left: Any) -> np.ndarray:
    """A square of `size` pixels of the image with its shorter side resized to `shorter`."""
    height, width = small(*image.shape[:2], shorter)
    rows = area(top, top + size, image.shape[0], height)
    return resample(image, rows, area(left, left + size, image.shape[1], width))


def central(image: np.ndarray, size: int, shorter: int) -> np.ndarray:
    """`resize_small` and the middle: what big_vision evaluates."""
    height, width = small(*image.shape[:2], shorter)
    return window(image, size, shorter, (height - size) // 2, (width - size) // 2)


def random_crop(rng: np.random.Generator, image: Any, size: int, shorter: int) -> np.ndarray:
    """`resize_small` and `random_crop`."""
    height, width = small(*image.shape[:2], shorter)
    top, left = (int(rng.integers(side - size + 1)) for side in (height, width))
    return window(image, size, shorter, top, left)


def inception_crop(rng: np.random.Generator, image: Any, size: int) -> np.ndarray:
    """`inception_crop`: a random part of 5 to 100 percent of the area, resized to a square."""
    top, left, height, width = inception_box(rng, *image.shape[:2])
    part = image[top : top + height, left : left + width]
    return resample(part, bilinear(height, size), bilinear(width, size))


def inception_box(rng: np.random.Generator, height: int, width: int) -> tuple:
    """(top, left, height, width) as TensorFlow's `sample_distorted_bounding_box` draws it.

    The aspect ratio is uniform, and so is the height among those that fit, not the area. The whole
    image if no attempt succeeds.
    """
    smallest = 0.05 * height * width
    for _ in range(100):
        aspect = rng.uniform(0.75, 1.33)
        low = round((smallest / aspect) ** 0.5)
        high = min(round((height * width / aspect) ** 0.5), height, int((width + 0.4999) / aspect))
        if low > high:
            continue
        h = int(rng.integers(low, high + 1))
        w = round(h * aspect)
        if h * w < smallest:
            h += 1
            w = round(h * aspect)
        if smallest <= h * w and 0 < h <= height and 0 < w <= width:
            top, left = (int(rng.integers(max(n, 1))) for n in (height - h, width - w))
            return top, left, h, w
    return 0, 0, height, width


class Crops:
    """The images of a split, cropped anew in each epoch.

    Args:
      read: `i -> image [h, w, 3] uint8`.
      number: number of images.
      kind: "resmall" or "inception".
      pixels: `decoding.Pixels` with the size of the crops and, for "resmall", the shorter side.
      seed: seed of the run.
    """

    def __init__(self, read, number, kind, pixels, seed):
        self.read, self.kind, self.seed = read, kind, seed
        self.size, self.shorter = pixels.size, pixels.shorter
        self.shape = (number, pixels.size, pixels.size, 3)

    dtype = np.dtype(np.uint8)

    def __len__(self):
        return self.shape[0]

    def picked(self, which: np.ndarray) -> "Crops":
        """Those of some images alone."""
        out = copy.copy(self)
        out.read, out.shape = lambda i: self.read(which[i]), (len(which), *self.shape[1:])
        return out

    def __getitem__(self, index):
        """Those of the first epoch."""
        return self.take(0, np.arange(len(self))[index])

    def take(self, epoch: int, which: Sequence[int], cancelled: Any = None) -> np.ndarray:
        """Crops of an epoch, [n, size, size, 3] uint8; another seed or epoch has others.

        Args:
          epoch: number of the epoch.
          which: indices of the images.
          cancelled: a `threading.Event` that ends this at once; what it returns then is no use.
        """

        def one(i):
            if cancelled is not None and cancelled.is_set():
                return 0
            rng = np.random.default_rng((self.seed, epoch, i))
            if self.kind == "inception":
                return inception_crop(rng, self.read(i), self.size)
            return random_crop(rng, self.read(i), self.size, self.shorter)

        out = np.empty((len(which), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, crop in enumerate(pool.map(one, map(int, which))):
                out[i] = crop
        return out
