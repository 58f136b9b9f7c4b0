"""Models: plain, without any knowledge of how they are fine-tuned.

A family is a module with variants and a flax model; `build` is all that the rest of the library calls.
"""

from typing import Any

import jax

from rlrr_jax.models import vit

# The bundled model, see tools/make_bundled.py.
BUNDLED = dict(width=96, depth=6, mlp_dim=384, num_heads=3, patch_size=8)


def sizes(variant: str) -> dict[str, int]:
    """Arguments of a variant's model: `"B/16"` -> `dict(width=768, ..., patch_size=16)`.

    Raises UserError for an unknown variant, with the nearest one.
    """
    return dict(BUNDLED) if variant == "bundled" else vit.parse_variant(variant)


def build(variant: str, num_classes: int, **options: Any) -> vit.ViT:
    """The flax model of a variant.

    Args:
      variant: size and patch, such as "B/16", or "bundled".
      num_classes: number of classes of the head.
      **options: other values of the model's attributes.
    """
    return vit.ViT(**{**sizes(variant), **options}, num_classes=num_classes)


def shapes(model: Any, image_size: int) -> Any:
    """Shapes of a model's parameters, without computing anything.

    Args:
      model: a model made by `build`.
      image_size: side of its images in pixels.
    """
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), "float32")
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def default_unroll(variant: str) -> int:
    """Blocks in each step of the scan over depth: on CPUs all, faster and with less memory."""
    return sizes(variant)["depth"] if jax.default_backend() == "cpu" else 1
