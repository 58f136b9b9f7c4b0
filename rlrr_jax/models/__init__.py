"""Models: plain, without any knowledge of how they are fine-tuned.

A family is a module with `parse_variant`, a flax model and `check_size`; the functions here are all
that the rest of the library calls.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax

from rlrr_jax import lookup
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.models import resnet, swin, vit
from rlrr_jax.sides import Size, pair

# The bundled model, see tools/make_bundled.py.
BUNDLED = dict(width=96, depth=6, mlp_dim=384, num_heads=3, patch_size=8)
FAMILIES = {"vit": vit, "swin": swin, "resnet": resnet}  # a variant is of the first that knows it


def family(variant: str) -> str:
    """Name of the family of a variant: a key of `FAMILIES`.

    Raises UserError for an unknown variant, with the nearest one.
    """
    if variant == "bundled":
        return "vit"
    for name, module in FAMILIES.items():
        if module.parse_variant(variant):
            return name
    raise unknown("model variant", variant, [name for m in FAMILIES.values() for name in m.EXAMPLES])


def family_of(model: Any) -> str:
    """Name of the family of a model."""
    return type(model).__module__.rpartition(".")[2]


def sizes(variant: str) -> dict[str, Any]:
    """Arguments of a variant's model: `"B/16"` -> `dict(width=768, ..., patch_size=16)`.

    Raises UserError for an unknown variant, with the nearest one.
    """
    return dict(BUNDLED) if variant == "bundled" else _module(variant).parse_variant(variant)


def build(variant: str, num_classes: int, **options: Any) -> Any:
    """The flax model of a variant.

    Args:
      variant: size and patch, such as "B/16", "swin_b", or "bundled".
      num_classes: number of classes of the head.
      **options: other values of the model's attributes; None leaves them as they are.

    Raises UserError for an option that models of this family do not have.
    """
    model = _module(variant).Model
    known = {field.name for field in dataclasses.fields(model)}
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(given.get("block"), str) and "block" in known:
        block = lookup.find("block", name := given["block"])
        if not isinstance(block, type) or not issubclass(block, vit.Block):
            raise UserError(f"the block {name} must be a class like rlrr_jax.models.vit.Block")
        given["block"] = block
    for key in given:
        if key not in known:
            raise UserError(f"config.model.{key} is of no use for {variant}: leave it out")
    return model(**{**sizes(variant), **given}, num_classes=num_classes)


def _module(variant: str) -> ModuleType:
    return FAMILIES[family(variant)]


def check_size(model: Any, image_size: Size) -> None:
    """Raises UserError, with the nearest size, for images that a model cannot take."""
    FAMILIES[family_of(model)].check_size(model, image_size)


def default_size(variant: str) -> int:
    """Side in pixels of the images that a variant is trained on where nothing says otherwise."""
    if variant == "bundled":
        return 32
    return getattr(_module(variant), "default_size", lambda variant: 224)(variant)


def shapes(model: Any, image_size: Size) -> Any:
    """Shapes of a model's parameters, without computing anything.

    Args:
      model: a model made by `build`.
      image_size: size of its images in pixels, see `sides`.
    """
    image = jax.ShapeDtypeStruct((1, *pair(image_size), 3), "float32")
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def default_unroll(variant: str) -> int | None:
    """Blocks in each step of the scan over depth: on CPUs all, faster and with less memory."""
    size = sizes(variant)
    if family(variant) == "resnet":
        return None  # nothing is scanned
    every = size["depth"] if "depth" in size else max(size["depths"])
    return every if jax.default_backend() == "cpu" else 1


def head_inputs(model: Any, params: Any, images: jax.Array) -> jax.Array:
    """What a model gives its head [B, D], of images [B, H, W, 3] in [-1, 1]."""
    _, kept = model.apply({"params": params}, images, mutable=["pre_logits"])
    return kept["pre_logits"]["features"][0]
