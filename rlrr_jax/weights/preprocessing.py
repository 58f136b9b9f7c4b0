"""What a backbone's shapes do not show: GELU, pixels, attention heads, epsilon, pooling."""

import json
import pathlib
import re
import urllib.parse
from typing import Any, NamedTuple

import safetensors

from rlrr_jax import models
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
INDEX = ".safetensors.index.json"  # of a file in several shards
# What file names of timm and of the original code say, where nothing else does.
_BY_NAME = (
    (r"vit_large_patch14_clip_\d+\.laion2b", (HALF, HALF)),
    (r"(^|[^a-z])clip", CLIP),
    (r"(^|[^a-z])(augreg|siglip|orig_in21k|sam_in1k|resnetv2_\d+x\d_bit)", (HALF, HALF)),
    (r"(^|[^a-z])((dino|mae|moco|deit|swin)(v?\d|[^a-z]|$)|resnet\d)", IMAGENET),
)
_ACTIVATIONS = {"gelu": "exact", "gelu_erf": "exact", "gelu_tanh": "tanh", "gelu_pytorch_tanh": "tanh"}
_ACTIVATIONS |= {"gelu_new": "tanh", "quick_gelu": "quick"}
# timm's architectures that have the heads of their size, as `vit.VARIANTS` says.
_ARCHITECTURE = r"((?:vit|deit|deit3)_(tiny|small|base|large|huge)(?:_distilled)?_patch(\d+)\w*)"
_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
# model_type of transformers and architecture of timm, of each family of models.
_HF_TYPES = {
    "vit": (
        *("vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae", "vit_msn"),
        *("clip", "clip_vision_model", "siglip", "siglip_vision_model"),
    ),
    "swin": ("swin",),
    "resnet": (),
}
_TIMM_NAMES = {"swin": "swin_", "resnet": "resnet"}


class Card(NamedTuple):
    """A backbone's habits; None where nothing says it.

    Attributes:
      gelu: "tanh" or "exact".
      mean, std: mean and standard deviation of each colour, for pixels in [0, 1]; all 0.5 is [-1, 1].
      source: words that name where this comes from.
      image_size: side of the images in pixels; (height, width) of a ViT where they differ.
      pooling: timm's name; "token" is the class token.
      num_heads: number of attention heads.
      norm_eps: epsilon of its LayerNorms.
      resize: how its code resizes a position embedding, see `pretrained.RESIZES`.
      notes: sentences about what was passed over.
      by_name: whether mean and std are what file names of that kind have, and nothing else says it.
    """

    gelu: str | None
    mean: tuple | None
    std: tuple | None
    source: str
    image_size: int | tuple[int, int] | None = None
    pooling: str | None = None
    num_heads: int | None = None
    norm_eps: float | None = None
    resize: str | None = None
    notes: tuple = ()
    by_name: bool = False


JAX = Card("tanh", HALF, HALF, "its layout says so", norm_eps=1e-6, resize="linear")


def of_jax(name: Any) -> bool:
    """Whether a name, path or address is of the public JAX weights' layouts: all have one card."""
    name = str(name)
    path = urllib.parse.urlsplit(name).path if "://" in name else name
    other = name.startswith("hf:") or path.endswith((".safetensors", ".json"))
    return not (other or ("://" not in name and pathlib.Path(name).is_dir()))


def read(path: Any, name: str = "", needed: bool = True, variant: str | None = None) -> Card:
    """The `Card` of a weight file.

    The public JAX weights (`.npz`) have tanh and [-1, 1]. A `.safetensors` has the exact GELU, and what
    says more is, in this order: its own header (written by our export), timm's `<file>.json` or
    `config.json` or transformers' `config.json` and `preprocessor_config.json` beside it, its name.
    A `config.json` of another model is passed over with a note.

    Args:
      path: where the file is.
      name: what it was asked for by.
      needed: whether it is an error if nothing says how pixels are normalised.
      variant: `config.model.variant` of the model that it is for, if that is known.

    Raises UserError for that, for a damaged JSON or an unknown activation.
    """
    path = pathlib.Path(path)
    heads = vit.VARIANTS.get(str(variant).partition("/")[0], {}).get("num_heads")
    if of_jax(path):
        return JAX._replace(num_heads=heads)
    card, notes = _header(path), []
    if not card:
        beside = path.name.removesuffix(INDEX).removesuffix(".safetensors") + ".json"
        for config in (path.with_name(beside), path.with_name("config.json")):
            found, note = _beside(config, path, name, variant)
            card = card or found
            notes += [note] if note else []
    names = f"{pathlib.PurePath(name).name} {path.name}".lower()
    known = next((pixels for pattern, pixels in _BY_NAME if re.search(pattern, names)), (None, None))
    _check_positions(names, path)
    gelu = _ACTIVATIONS[_gelu_by_name(names) or "gelu"]
    card = card or Card(gelu, *known, "its name says so", norm_eps=_eps_by_name(names))
    if card.mean is None:
        card = card._replace(mean=known[0], std=known[1])
    card = card._replace(by_name=card.mean is not None and card.mean is known[0])
    if card.mean is None and needed:
        raise UserError(
            f"nothing says how the pixels of {path} are normalised"
            + "".join(f" ({note})" for note in notes)
            + ": put its config.json beside it, or set config.pretrained.mean and "
            "config.pretrained.std (0.5 each for [-1, 1])"
        )
    if card.num_heads is None:
        card = card._replace(num_heads=_heads_by_name(names, heads))
    resize = card.resize or ("bicubic_plain" if _of_transformers(path) else "bicubic")
    return card._replace(resize=resize, notes=tuple(notes))


def _check_positions(names, path):
    """UserError for models that only their name tells to have rotary positions."""
    if found := re.search(r"\w*(vit_pe_|dinov3|_rope_)\w*", names):
        raise UserError(
            f"{path} is a {found[0]}, which has rotary positions, as this ViT does not: take another"
        )


def _gelu_by_name(names):
    """The activation that timm's name of an architecture tells, else None."""
    if re.search(r"vit_(base_patch32_siglip_(gap_)?256|large_patch16_siglip_(gap_)?512)", names):
        return "gelu_tanh"  # of SigLIP 2
    return "quick_gelu" if "quickgelu" in names else None


def _eps_by_name(names):
    """The epsilon of LayerNorms that timm's name of an architecture tells, else None."""
    return 1e-5 if re.search(r"(^|[^a-z])clip", names) else None


def _heads_by_name(names, heads):
    """Heads that a name tells: those of the size, but for the public exceptions."""
    if re.search(r"(^|[^a-z])moco", names):  # its ViT-S has 12 (facebookresearch/moco-v3, vits.py)
        return 12 if heads == vit.VARIANTS["S"]["num_heads"] else heads
    public = re.search(_ARCHITECTURE, names) or any(re.search(p, names) for p, _ in _BY_NAME)
    return heads if public else None


def check(gelu: str, mean: Any, std: Any) -> None:
    """ValueError unless these can be a GELU, and three means and standard deviations."""
    if gelu not in ("tanh", "exact", "quick"):
        raise ValueError(f"unknown GELU {gelu!r}")
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9
    for what, values in {"mean": mean, "std": std}.items():
        good = isinstance(values, list | tuple) and len(values) == 3 and all(map(number, values))
        if not good or (what == "std" and min(values) <= 0):
            raise ValueError(f"{what} {values!r} is not three numbers")


def _header(path):
    """What our own export wrote into a file."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            said = json.loads((file.metadata() or {}).get("rlrr_jax", "{}"))
    except Exception:  # whoever reads its arrays says what is wrong
        return None
    if not isinstance(said, dict) or "mean" not in said:
        return None
    card = _card(said.get("gelu") or "exact", said, path, "its header")
    heads, eps = said.get("num_heads"), said.get("norm_eps")
    try:
        heads = heads if heads is None else _whole(heads, "num_heads")
        eps = eps if eps is None else _epsilon(eps)
        size = _size(said.get("image_size"))
    except (ValueError, TypeError) as e:
        raise UserError(f"what its header says of {path} is damaged ({e}): export it again") from e
    return card._replace(image_size=size, num_heads=heads, norm_eps=eps)


def _beside(config, path, name, variant):
    """The card of a JSON beside a file, None if it says nothing of it; and a note why."""
    if not config.exists():
        return None, None
    try:
        said = json.loads(config.read_text())
        if not isinstance(said, dict):
            raise TypeError("it is no object")
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{config} is no config.json of timm or transformers ({e!r}): remove it") from e
    if isinstance(said.get("vision_config"), dict):  # of a model that has a text encoder, too
        said = {**said, **said["vision_config"], "model_type": said.get("model_type")}
    hugging = "model_type" in said or "hidden_size" in said or "architectures" in said
    if not hugging and not said.keys() & {"pretrained_cfg", "architecture", "model_args", "mean"}:
        return None, f"{config} says nothing of a ViT, and is passed over"
    try:
        if other := (_other_hf if hugging else _other_timm)(said, path, name, variant):
            return None, f"{config} is of another model ({other}), and is passed over"
        return (_hf if hugging else _timm)(said, config), None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{config} is damaged ({e}): replace or remove it") from e


def _other_timm(said, path, name, variant):
    """What tells that timm's config.json belongs to another file, else None."""
    architecture = said.get("architecture")
    if not isinstance(architecture, str):
        return None
    for text in (pathlib.PurePath(name).name, path.name):
        own = re.search(_ARCHITECTURE, text.lower().partition(".")[0])
        if own and not own[1].startswith(architecture.partition(".")[0]):  # or a name made from it
            return f"its architecture is {architecture}"
    bit = re.sub(r"^bit_(\d+x\d)$", r"resnetv2_\1_bit", str(variant))
    if variant and models.family(variant) == "resnet" and architecture not in (variant, bit):
        return f"its architecture is {architecture}, the model is {variant}"
    if variant and not architecture.startswith(_TIMM_NAMES.get(models.family(variant), "")):
        return f"its architecture is {architecture}, the model is {variant}"
    sizes = re.search(_ARCHITECTURE, architecture)
    if sizes and variant not in (None, "bundled"):
        ours = f"{_SIZES[sizes[2]]}/{sizes[3]}"
        if ours != variant:
            return f"its architecture is {architecture}, the model is {variant}"
    return None


def _other_hf(said, path, name, variant):
    """What tells that transformers' config.json belongs to another model, else None."""
    kind = said.get("model_type")
    family = models.family(variant or "bundled")
    if kind not in (None, *_HF_TYPES[family]):
        return f"its model_type is {kind}"
    if variant in (None, "bundled") or family != "vit":
        return None
    ours = models.sizes(variant)
    for key, own in (("hidden_size", "width"), ("num_hidden_layers", "depth"), ("patch_size",) * 2):
        if said.get(key) not in (None, ours[own]):
            return f"its {key} is {said[key]}, that of {variant} {ours[own]}"
    return None


def _timm(said, config):
    """The card of timm's config.json."""
    pixels, model = said.get("pretrained_cfg", said), said.get("model_args") or {}
    architecture = str(said.get("architecture"))
    _check_positions(architecture, config)
    size = pixels.get("input_size")
    gelu = _activation(model.get("act_layer") or _gelu_by_name(architecture) or "gelu", config)
    card = Card(gelu, None, None, f"{config.name} says so")
    if "mean" in pixels:
        card = _card(gelu, pixels, config, config.name)
    heads = model.get("num_heads")
    if heads is None and (size_of := re.search(_ARCHITECTURE, str(said.get("architecture")))):
        heads = vit.VARIANTS[_SIZES[size_of[2]]]["num_heads"]
    return card._replace(
        image_size=_size(size and list(size)[1:]),
        pooling=model.get("global_pool", said.get("global_pool")),
        num_heads=heads if heads is None else _whole(heads, "num_heads"),
        resize="bicubic",
        norm_eps=_eps_by_name(architecture),
    )


def _hf(said, config):
    """The card of transformers' config.json; pixels are in the preprocessor's file beside it."""
    kind = str(said.get("model_type")).partition("_")[0]
    default = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}.get(kind, "gelu")
    gelu = _activation(said.get("hidden_act", default), config)
    path, mean, std = config.with_name("preprocessor_config.json"), None, None
    try:
        pixels = json.loads(path.read_text()) if path.exists() else {}
        if pixels.get("image_mean") is not None:
            check(gelu, pixels["image_mean"], pixels.get("image_std"))
            mean, std = tuple(pixels["image_mean"]), tuple(pixels["image_std"])
    except (ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}): replace or remove it") from e
    size = said.get("image_size")
    eps = {"dinov2": 1e-6, "swin": 1e-5, "clip": 1e-5, "siglip": 1e-6}.get(kind, 1e-12)
    eps = _epsilon(said.get("layer_norm_eps", eps))
    heads = said.get("num_heads" if said.get("model_type") == "swin" else "num_attention_heads", 12)
    return Card(
        *(gelu, mean, std, f"{config.name} says so"),
        image_size=_size(size),
        num_heads=heads if isinstance(heads, list) else _whole(heads, "num_attention_heads"),
        norm_eps=eps,
        resize="bicubic_plain",
    )


def _activation(name, config):
    if name not in _ACTIVATIONS:
        names = ", ".join(_ACTIVATIONS)
        raise UserError(f"{config}: the activation {name} is none of {names}: take another model")
    return _ACTIVATIONS[name]


def _whole(value, what):
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1000:
        raise ValueError(f"{what} {value!r} is no number of heads")
    return value


def _epsilon(value):
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f"epsilon {value!r} is no small number above 0")
    return float(value)


def _size(value):
    """A side, or (height, width) where they differ; None for none. ValueError for what is no size."""
    sides = list(value) if isinstance(value, list | tuple) else [value]
    if value is None or not sides:
        return None
    whole = all(isinstance(x, int) and not isinstance(x, bool) and 0 < x <= 1 << 14 for x in sides)
    if not whole or len(sides) > 2:
        raise ValueError(f"image size {value!r} is no size in pixels")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


def _card(gelu, pixels, path, source):
    try:
        mean, std = pixels.get("mean"), pixels.get("std")
        check(gelu, mean, std)
    except (ValueError, AttributeError) as e:
        raise UserError(f"what {source} says of {path} is damaged ({e}): replace or remove it") from e
    return Card(gelu, tuple(mean), tuple(std), f"{source} says so")


def _of_transformers(path):
    """Whether a file's arrays have the names of transformers."""
    try:
        if path.name.endswith(INDEX):
            names = json.loads(path.read_text())["weight_map"]
        else:
            with safetensors.safe_open(path, "numpy") as file:
                names = list(file.keys())
    except Exception:  # whoever reads its arrays says what is wrong
        return False
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names)
