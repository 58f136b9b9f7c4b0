"""Models: plain, without any knowledge of how they are fine-tuned.

A family is a module with `parse_variant`, a flax model and `check_size`; the functions here are all
that the rest of the library calls. A variant may be a path to a network of one's own, see `build`.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax

from rlrr_jax import backend, lookup
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.models import convnext, matmul, resnet, rope_vit, swin, swinv2, vit
from rlrr_jax.sides import Size, pair

# The bundled model, see tools/make_bundled.py.
BUNDLED = dict(width=96, depth=6, mlp_dim=384, num_heads=3, patch_size=8)
# A variant, or a model, is of the first that knows it.
FAMILIES = {"rope_vit": rope_vit, "vit": vit, "swinv2": swinv2, "swin": swin, "resnet": resnet}
FAMILIES |= {"convnext": convnext}
OTHER = "other"  # the family of a network that is a subclass of none of them


def family(variant: str) -> str:
    """Name of the family of a variant: a key of `FAMILIES`, or `OTHER`.

    Raises UserError for an unknown variant, with the nearest one.
    """
    if variant == "bundled":
        return "vit"
    if lookup.is_path(variant):
        return _family_of(_network(variant))
    for name, module in FAMILIES.items():
        if module.parse_variant(variant):
            return name
    raise unknown("model variant", variant, [name for m in FAMILIES.values() for name in m.EXAMPLES])


def family_of(model: Any) -> str:
    """Name of the family of a model."""
    return _family_of(type(model))


def is_vit(variant: str) -> bool:
    """Whether a variant's model is a `vit.ViT`, of whatever family."""
    return issubclass(_network(variant), vit.ViT)


def embeds_positions(variant: str) -> bool:
    """Whether a variant's model has a position embedding of each patch."""
    rotary = family(variant) == "rope_vit"
    return sizes(variant).get("embedded", False) if rotary else is_vit(variant)


def _family_of(network: type) -> str:
    return next((name for name, m in FAMILIES.items() if issubclass(network, m.Model)), OTHER)


def _network(variant: str) -> type:
    """The class of a variant's model; UserError for a path to something else."""
    if not lookup.is_path(variant):
        return FAMILIES[family(variant)].Model
    found = lookup.find("model", variant)
    network = isinstance(found, type) and issubclass(found, nn.Module)
    if not network or not {"num_classes", "dtype"} <= {x.name for x in dataclasses.fields(found)}:
        raise UserError(
            f"the model {variant} must be a flax module with the attributes num_classes and dtype"
        )
    return found


def attributes(variant: str) -> set[str]:
    """Names of what can be set of a variant's model."""
    return {field.name for field in dataclasses.fields(_network(variant))} - {"parent", "name"}


def sizes(variant: str) -> dict[str, Any]:
    """Arguments of a variant's model: `"B/16"` -> `dict(width=768, ..., patch_size=16)`.

    Raises UserError for an unknown variant, with the nearest one.
    """
    if variant == "bundled":
        return dict(BUNDLED)
    if lookup.is_path(variant):
        fields = {field.name: field.default for field in dataclasses.fields(_network(variant))}
        leave = ("parent", "name", "num_classes")
        return {k: x for k, x in fields.items() if x is not dataclasses.MISSING and k not in leave}
    return FAMILIES[family(variant)].parse_variant(variant)


def build(variant: str, num_classes: int, **options: Any) -> Any:
    """The flax model of a variant.

    A network of one's own is a flax module with the attributes `num_classes` and `dtype`, called with
    images in [-1, 1], a drop rate and its keys or None. It sows what its head gets as "pre_logits",
    "features", and the head is a Dense of name "head". Methods find its layers by `kernel` and `scale`.

    Args:
      variant: size and patch, such as "B/16", "swin_b", or "bundled", or a path `module:class`.
      num_classes: number of classes of the head.
      **options: other values of the model's attributes; None leaves them as they are.

    Raises UserError for an option that models of this family do not have.
    """
    model: Any = _network(variant)
    known = attributes(variant)
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(given.get("block"), str) and "block" in known:
        given["block"] = _block(given["block"], model.block)
    for key in given:
        if key not in known:
            raise UserError(f"config.model.{key} is of no use for {variant}: leave it out")
    return model(**{**sizes(variant), **given}, num_classes=num_classes)


def _block(name: str, plain: type) -> type:
    """The class of blocks of a path `module:class`, with what a family's own blocks do besides."""
    block = lookup.find("block", name)
    if isinstance(block, type) and issubclass(block, plain):
        return block
    same = ("__call__", "attend", "mlp")
    if not isinstance(block, type) or not issubclass(block, vit.Block):
        raise UserError(f"the block {name} must be a class like rlrr_jax.models.vit.Block")
    if other := [key for key in same if getattr(block, key) is not getattr(vit.Block, key)]:
        raise UserError(
            f"the block {name} has another {other[0]} than {plain.__module__}.Block: "
            f"derive it from that"
        )
    joined: type = _joined(block, plain)  # type: ignore[arg-type]
    return joined


@functools.lru_cache(32)
def _joined(block: Any, plain: Any) -> type:
    """One class for two, always the same: programs are kept by it."""
    return type(block.__name__, (block, plain), {})


def check_size(model: Any, image_size: Size) -> None:
    """Raises UserError, with the nearest size, for images that a model cannot take.

    Of a network of one's own, whose errors are its own, checks what `build` asks for.
    """
    if (name := family_of(model)) != OTHER:
        return FAMILIES[name].check_size(model, image_size)
    tree, image = shapes(model, image_size), jax.ShapeDtypeStruct((1, *pair(image_size), 3), "float32")
    call = lambda tree, x: model.apply({"params": tree}, x, 0.0, None, mutable=["pre_logits"])
    logits, kept = jax.eval_shape(call, tree, image)
    sown = "features" in kept.get("pre_logits", {})
    head = tree.get("head", {}).keys() == {"kernel", "bias"}
    if not (sown and head) or logits.shape != (1, model.num_classes):
        raise UserError(
            f"the model {type(model).__name__} must return logits [B, num_classes] of a Dense with the "
            f'name "head", and sow what that gets: self.sow("pre_logits", "features", x)'
        )


def default_size(variant: str) -> int:
    """Side in pixels of the images that a variant is trained on where nothing says otherwise."""
    if variant == "bundled":
        return 32
    module = FAMILIES.get(family(variant))
    return getattr(module, "default_size", lambda variant: 224)(variant)


def shapes(model: Any, image_size: Size) -> Any:
    """Shapes of a model's parameters, without computing anything.

    Args:
      model: a model made by `build`.
      image_size: size of its images in pixels, see `sides`.
    """
    return jax.tree.map(lambda x: x, cached_shapes(model, pair(image_size)))


@functools.lru_cache(64)
def cached_shapes(model: Any, size: tuple[int, int]) -> Any:
    """As `shapes`, the same tree each time: a run asks several times, and each takes a trace."""
    image = jax.ShapeDtypeStruct((1, *size, 3), "float32")
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def default_attention(variant: str, dtype: str) -> str:
    """How attention is computed: by cuDNN where this GPU does, with the right numbers; else by XLA."""
    size = sizes(variant)
    if not is_vit(variant) or dtype != "bfloat16" or backend.platform() != "gpu":
        return "xla"
    width = size["width"] // size["num_heads"]
    if not matmul.takes_heads_of(width):
        return "xla"
    return "cudnn" if backend.absent() or matmul.fused_attention_works(width) else "xla"


def default_unroll(variant: str) -> int | None:
    """Blocks in each step of the scan over depth: one on TPUs, which compile slowly, elsewhere all.

    A scan writes what the gradient needs of each block into an array of all, and reads it from there:
    23 of 55 GB that a step of B/16 moves on a GPU (benchmarks/bytes.py). On CPUs it takes more memory.
    """
    size = sizes(variant)
    if "unroll" not in attributes(variant):
        return None  # nothing is scanned
    every = size["depth"] if "depth" in size else max(size["depths"])
    return 1 if backend.platform() == "tpu" else every


def head_inputs(model: Any, params: Any, images: jax.Array) -> jax.Array:
    """What a model gives its head [B, D], of images [B, H, W, 3] in [-1, 1]."""
    _, kept = model.apply({"params": params}, images, mutable=["pre_logits"])
    return kept["pre_logits"]["features"][0]
