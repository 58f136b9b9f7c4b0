"""An image as pixels: decoded, turned, brought to RGB and to a size by Pillow."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import ExifTags, Image

from rlrr_jax.data import crops, sources
from rlrr_jax.data.task import Split
from rlrr_jax.errors import UserError
from rlrr_jax.sides import Size, pair

VARIANTS = ("original", "jpeg75")


class Pixels(NamedTuple):
    """What is made of an image.

    Attributes:
      size: size of the images that the model takes, see `sides`.
      variant: "jpeg75" saves and loads each image as JPEG of quality 75, 4:2:0, before anything else.
      shorter: big_vision's evaluation instead of the whole image: the middle of the image with its
        shorter side resized to so many pixels (`crops.central`).
      upright: whether the image is turned as its EXIF says, as viewers show it.
      white: whether a transparent image is laid on white, as viewers show it; else alpha is dropped, as
        in VTAB's numbers.
    """

    size: Size
    variant: str = "original"
    shorter: int | None = None
    upright: bool = False
    white: bool = False


def pixels_for(size: Size, crop: str | None, crop_from: int | None, **options: Any) -> Pixels:
    """What is stored of the images of a run, which are cut from it by `crop`, see `crops`.

    Args:
      size: size of the images that the model takes, see `sides`.
      crop: a name of `crops.KINDS`, or None.
      crop_from: shorter side, or side of the whole square, that crops are cut from.
      **options: other values of `Pixels`.
    """
    if crops.by_host(crop):
        return Pixels(size, shorter=crop_from, **options)
    return Pixels((crop_from if crop else None) or size, **options)


def pixels_of(pixels: Any) -> Pixels:
    """A `Pixels`, of one or of just a size."""
    return pixels if isinstance(pixels, Pixels) else Pixels(pixels)


def decode(image: Any, pixels: Any, scale: int = 1) -> np.ndarray:
    """An RGB image [height, width, 3] uint8 from encoded bytes or an array.

    The authors' preprocessing: Pillow's bicubic resize (antialiased), the aspect ratio ignored.

    Args:
      image: encoded bytes, or an array [H, W] or [H, W, 3] of uint8.
      pixels: a `Pixels`, or just the size.
      scale: factor of the pixel values (dsprites is stored as 0 and 1).
    """
    pixels = pixels_of(pixels)
    image = rgb(image, pixels, scale)
    if pixels.shorter:
        return crops.central(np.asarray(image), pixels.size, pixels.shorter)
    size = pair(pixels.size)[::-1]  # Pillow's width comes first
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


def rgb(image: Any, pixels: Pixels, scale: int = 1) -> Image.Image:
    """An RGB Pillow image of its own size; arguments are those of `decode`."""
    image = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
    if pixels.upright:
        image = _upright(image)
    if image.mode == "I" and image.format == "PPM":  # a PGM of 16 bits, which Pillow brings to 65535
        image = Image.fromarray(np.uint16(np.clip(np.asarray(image), 0, 65535)))
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.uint8(np.round(np.asarray(image) / 257)))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = _on_white(image) if pixels.white else image
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns of the direct way
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if scale != 1:
        image = Image.fromarray(np.asarray(image) * np.uint8(scale))
    if pixels.variant == "jpeg75":
        image = Image.open(io.BytesIO(sources.jpeg75(image))).convert("RGB")
    return image


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF's orientation says; the rest of EXIF, which may be wrong, is not read."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    """An image with transparency as viewers show it; one that is opaque everywhere keeps its pixels."""
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)


@contextlib.contextmanager
def readable(split: Split, i: int) -> Iterator[None]:
    """Explains whatever Pillow raises for the image `i` of a `sources.Split`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:  # its decoders raise anything
        why = "it is no image" if isinstance(e, PIL.UnidentifiedImageError) else e
        own = "own" in split.key
        fault = "cannot be used" if own else "is damaged"
        way = "remove or replace it" if own else "prepare it again"
        raise UserError(f"{split.where(i)} {fault} ({why}): {way}") from e
