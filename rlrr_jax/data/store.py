"""Splits as arrays: decoded and resized once, with Pillow."""

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from rlrr_jax.data import sources
from rlrr_jax.errors import UserError

_CHUNK = 1024


def decode(image, size):
    """An RGB image [size, size, 3] uint8 from encoded bytes or an array.

    The authors' preprocessing: Pillow's bicubic resize (antialiased), the aspect ratio ignored.
    """
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    else:
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def load_split(name, task, split, size, data_dir=None):
    """All images [N, size, size, 3] uint8 and labels [N] int32 of a split, in the source's order."""
    read, number = sources.open_split(name, task, split, data_dir)
    images = np.empty((number, size, size, 3), np.uint8)
    labels = np.empty(number, np.int32)

    def put(item):
        i, (image, label) = item
        try:
            images[i], labels[i] = decode(image, size), label
        except OSError as e:  # Pillow's
            raise UserError(f"image {i} of {name} {split} is damaged ({e}): prepare it again") from e

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=number, desc=f"{name} {split}", unit="img", disable=number < 5000) as bar,
    ):
        for start in range(0, number, _CHUNK):
            examples = read(start, min(start + _CHUNK, number))
            for _ in pool.map(put, enumerate(examples, start)):
                bar.update()
    if number and not 0 <= labels.min() <= labels.max() < task.classes:
        raise UserError(
            f"labels of {name} {split} go from {labels.min()} to {labels.max()}, but the task has "
            f"{task.classes} classes: the dataset is not the expected one, prepare it again"
        )
    return images, labels
