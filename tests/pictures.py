"""Looks at a picture as far as a program can; runs of this process draw none that nobody looks at."""

import contextlib
import io

import numpy as np
from PIL import Image

from rlrr_jax.results import plots

DRAW, EMPTY = plots.png, io.BytesIO()
Image.new("RGB", (8, 8), "white").save(EMPTY, "png")


def skip():
    """Figures are made and not drawn, which takes an eighth of the tests' time."""
    plots.png = lambda figure, dpi=120: EMPTY.getvalue()


@contextlib.contextmanager
def drawn():
    """Draws figures."""
    plots.png = DRAW
    try:
        yield
    finally:
        skip()


def look(picture, size=None, colours=3):
    """The pixels of a PNG (bytes or a path) that is no empty canvas.

    Args:
      size: width and height that it must have.
      colours: how many saturated colours it must have at least: lines or marks that were drawn.
    """
    picture = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    with Image.open(picture) as image:
        assert image.format == "PNG" and size in (None, image.size), image.size
        pixels = np.asarray(image.convert("RGB")).astype(int)
    white = (pixels == 255).all(-1).mean()
    assert 0.3 < white < 0.995, white
    flat = pixels.reshape(-1, 3)
    bright = flat[np.ptp(flat, axis=1) > 60] // 32
    assert len(np.unique(bright, axis=0)) >= colours
    return pixels
