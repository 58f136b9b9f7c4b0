"""What a backbone's shapes do not show: GELU, pixels, attention heads, epsilon, pooling."""

import json
import math
import pathlib
import re
import urllib.parse
from typing import Any, NamedTuple

import safetensors

from rlrr_jax import models
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.weights import architectures, positions, state_dicts, values

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# What file names of timm and of the original code say, where nothing else does.
_BY_NAME = (
    (r"dinov3.*sat493m", ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))),
    (r"vit_large_patch14_clip_\d+\.laion2b|vit_pe_core", (HALF, HALF)),
    (r"(^|[^a-z])clip|eva02_\w+_patch14_\d", CLIP),
    (r"(^|[^a-z])(augreg|siglip|orig_in21k|sam_in1k|resnetv2_\d+x\d_bit)", (HALF, HALF)),
    (r"(^|[^a-z])((dino|mae|moco|deit|swin|convnext)(v?\d|[^a-z]|$)|resnet\d)", IMAGENET),
)
_ACTIVATIONS = {"gelu": "exact", "gelu_erf": "exact", "gelu_tanh": "tanh", "gelu_pytorch_tanh": "tanh"}
_ACTIVATIONS |= {"gelu_new": "tanh", "quick_gelu": "quick"}


class _Type(NamedTuple):
    """What a model_type of transformers has where its config.json says nothing, and its family here."""

    family: str
    gelu: str
    eps: float
    resize: str = "bicubic_plain"


_HF_TYPES = {
    **dict.fromkeys(("vit", "deit", "vit_mae", "vit_msn", "ijepa"), _Type("vit", "gelu", 1e-12)),
    "dinov2": _Type("vit", "gelu", 1e-6),
    "dinov2_with_registers": _Type("vit", "gelu", 1e-6, "bicubic"),  # which antialiases
    "dinov3_vit": _Type("rope_vit", "gelu", 1e-5),
    "swin": _Type("swin", "gelu", 1e-5),
    "swinv2": _Type("swinv2", "gelu", 1e-5),
    **dict.fromkeys(("convnext", "dinov3_convnext"), _Type("convnext", "gelu", 1e-6)),
}
for _name, _type in {
    **dict.fromkeys(
        ("clip", "chinese_clip", "altclip", "metaclip_2"), _Type("vit", "quick_gelu", 1e-5)
    ),
    "siglip": _Type("vit", "gelu_pytorch_tanh", 1e-6),
}.items():
    _HF_TYPES |= dict.fromkeys((_name, f"{_name}_vision_model"), _type)


class Card(NamedTuple):
    """A backbone's habits; None where nothing says it.

    Attributes:
      gelu: "tanh", "exact" or "quick".
      mean, std: mean and standard deviation of each colour, for pixels in [0, 1]; all 0.5 is [-1, 1].
      source: words that name where this comes from.
      image_size: side of the images in pixels; (height, width) of a ViT where they differ.
      pooling: timm's name; "token" is the class token.
      num_heads: number of attention heads.
      norm_eps: epsilon of its LayerNorms.
      resize: how its code resizes a position embedding, see `pretrained.RESIZES`.
      notes: sentences about what was passed over.
      by_name: whether mean and std are what file names of that kind have, and nothing else says it.
      variant: `config.model.variant` of the architecture that it names.
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
    variant: str | None = None


JAX = Card("tanh", HALF, HALF, "its layout says so", norm_eps=1e-6, resize="linear")


def of_jax(name: Any) -> bool:
    """Whether a name, path or address is of the public JAX weights' layouts: all have one card."""
    name = str(name)
    path = urllib.parse.urlsplit(name).path if "://" in name else name
    other = name.startswith("hf:") or path.endswith((".safetensors", ".json"))
    return not (other or ("://" not in name and pathlib.Path(name).is_dir()))


def read(
    path: Any, name: str = "", needed: bool = True, variant: str | None = None, **given: bool
) -> Card:
    """The `Card` of a weight file.

    The public JAX weights (`.npz`) have tanh and [-1, 1]. Of a `.safetensors`, what says more is, in
    this order: its own header (our export's), timm's `<file>.json` or `config.json`, or those of
    transformers beside it, its name. A JSON beside a file is followed or refused.

    Args:
      path: where the file is.
      name: what it was asked for by.
      needed: whether it is an error if nothing says how pixels are normalised.
      variant: `config.model.variant` of the model that it is for, if that is known.
      **given: `ignore`, whether the JSON files beside it and its name are passed over, as its user
        says; `resized`, whether the patch embedding is brought to another size.

    Raises UserError for that, for a damaged JSON, for one of another model, and for an architecture or
    activation that is not computed here.
    """
    path, ignore, resized = pathlib.Path(path), given.get("ignore"), given.get("resized")
    heads = models.sizes(variant)["num_heads"] if variant and models.is_vit(variant) else None
    texts = [pathlib.PurePath(name).name.partition("@")[0], path.name]
    if of_jax(path):
        flexible = any("flexivit" in text.lower() for text in texts)
        return JAX._replace(num_heads=heads, resize="bilinear" if flexible else JAX.resize)
    card, notes, beside = _header(path), [], []
    if not card:
        own = path.name.removesuffix(state_dicts.INDEX).removesuffix(".safetensors") + ".json"
        beside = [path.with_name(own), path.with_name("config.json")]
        beside = [config for config in dict.fromkeys(beside) if config.exists()]
    if ignore:
        notes = [f"{config} is passed over, as config.pretrained.ignore_json says" for config in beside]
    for config in () if ignore else beside:
        card = card or _beside(config, variant, resized)
    if card is None:
        card = Card(None, None, None, "its name says so") if ignore else _by_name(texts, path, heads)
    of_size = str(variant).partition("/")[0] if resized else variant  # patches are another size then
    theirs = str(card.variant).partition("/")[0] if resized else card.variant
    if card.variant and variant not in (None, "bundled") and of_size != theirs:
        raise UserError(
            f"{path} is of {card.variant} ({card.source}), config.model.variant is {variant}: set "
            f"config.model.variant={card.variant}, or take another file{_ignoring(beside)}"
        )
    if card.mean is None and needed:
        raise UserError(
            f"nothing says how the pixels of {path} are normalised{''.join(f' ({n})' for n in notes)}: "
            f"{'' if beside else 'put its config.json beside it, or '}set config.pretrained.mean and "
            f"config.pretrained.std (0.5 each for [-1, 1]) and config.model.gelu (exact, tanh or quick)"
        )
    return card._replace(resize=card.resize or positions.rule(path), notes=(*card.notes, *notes))


def _ignoring(beside: list) -> str:
    """How a JSON beside a file is passed over; nothing where there is none."""
    way = ", or remove it, or say config.pretrained.ignore_json=True if it is not the file's"
    return way if beside else ""


def _by_name(texts: list[str], path: pathlib.Path, heads: int | None) -> Card:
    """What the name of a file or repository tells; all None where it tells nothing.

    Args:
      texts: names of the repository or folder, and of the file.
      path: where the file is.
      heads: attention heads of the model that it is for.
    """
    names = " ".join(texts).lower()
    mean, std = next(
        (pixels for pattern, pixels in _BY_NAME if re.search(pattern, names)), (None, None)
    )
    found = next(filter(None, (architectures.by_name(text, str(path)) for text in texts)), None)
    gelu, eps = ("exact" if mean and not re.search(r"(^|[^a-z])clip", names) else None), None
    number = heads if mean else None
    if found:
        gelu, eps, number = found.gelu, found.norm_eps, found.num_heads or heads
    if re.search(r"(^|[^a-z])moco", names):  # its ViT-S has 12 (facebookresearch/moco-v3, vits.py)
        number = 12 if heads == vit.VARIANTS["S"]["num_heads"] else heads
    card = Card(gelu, mean, std, "its name says so", num_heads=number, norm_eps=eps)
    return card._replace(by_name=mean is not None, variant=(found and found.variant) or None)


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
        heads = heads if heads is None else values.whole(heads, "num_heads")
        eps = eps if eps is None else values.epsilon(eps)
        size = values.size(said.get("image_size"))
    except (ValueError, TypeError) as e:
        raise UserError(f"what its header says of {path} is damaged ({e}): export it again") from e
    return card._replace(image_size=size, num_heads=heads, norm_eps=eps)


def _beside(config, variant, resized):
    """The card of a JSON beside a file; UserError for one that is of something else."""
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
        raise UserError(f"{config} says nothing of a model that is known here{_REMOVE}")
    try:
        if hugging and (other := _other_hf(said, variant, resized)):
            raise UserError(f"{config} is of another model ({other}){_REMOVE}")
        return (_hf if hugging else _timm)(said, config)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{config} is damaged ({e}): replace or remove it") from e


_REMOVE = (
    ": take another file, or say config.pretrained.ignore_json=True if this JSON is not the file's"
)


def _other_hf(said, variant, resized):
    """What tells that transformers' config.json belongs to another model, else None."""
    kind = said.get("model_type")
    family = models.family(variant or "bundled")
    known = _HF_TYPES.get(kind)
    if kind is not None and (known is None or known.family != family):
        return f"its model_type is {kind}"
    if said.get("num_channels", 3) != 3:
        return f"its num_channels is {said['num_channels']}"
    if family == "swinv2" and variant:
        return _other_windows(said, variant)
    if family not in ("vit", "rope_vit"):
        return None
    gated = bool(said.get("use_swiglu_ffn") or said.get("use_gated_mlp"))
    if gated != models.sizes(variant or "bundled").get("gated", False):
        return f"it has {'gated' if gated else 'plain'} MLPs"
    for key, value in {"rope_theta": 100.0, "key_bias": False}.items() if family == "rope_vit" else ():
        if said.get(key, value) != value:
            return f"its {key} is {said[key]}"
    if variant in (None, "bundled"):
        return None
    ours = models.sizes(variant)
    for key, own in (
        *(("hidden_size", "width"), ("num_hidden_layers", "depth"), ("patch_size",) * 2),
        ("intermediate_size", "mlp_dim"),
    ):
        if said.get(key) not in (None, ours[own]) and not (resized and key == "patch_size"):
            return f"its {key} is {said[key]}, that of {variant} {ours[own]}"
    ratio = said.get("mlp_ratio")
    if ratio is not None and ratio * ours["width"] != ours["mlp_dim"]:
        return f"its mlp_ratio is {ratio}, that of {variant} {ours['mlp_dim'] / ours['width']:g}"
    return None


def _other_windows(said, variant):
    """What tells that a Swin V2 has other windows, which its arrays do not show, else None."""
    ours = models.build(variant, 1)
    before = [ours.block_options(stage)["pretrained_window"] for stage in range(len(ours.depths))]
    for key, value in {"window_size": ours.window, "pretrained_window_sizes": before}.items():
        if key in said and said[key] != value:
            return f"its {key} is {said[key]}, that of {variant} {value}"
    return None


# Arguments of timm's models that a config.json may change; all others change what is computed.
_TIMM_ARGUMENTS = {
    *(
        "img_size",
        "num_classes",
        "global_pool",
        "act_layer",
        "num_heads",
        "dynamic_img_size",
        "drop_rate",
    ),
    *("drop_path_rate", "init_values", "dynamic_img_pad", "class_token", "reg_tokens", "fc_norm"),
    *("pre_norm", "no_embed_class", "patch_size", "embed_dim", "depth", "strict_img_size"),
}


def _timm(said, config):
    """The card of timm's config.json."""
    pixels, model = said.get("pretrained_cfg", said), said.get("model_args") or {}
    found = None
    if "architecture" in said:
        found = architectures.exact(str(said["architecture"]), str(config))
    if other := sorted(model.keys() - _TIMM_ARGUMENTS):
        raise UserError(
            f"{config} says {other[0]}={model[other[0]]!r}, which is not computed here{_REMOVE}"
        )
    gelu = found.gelu if found else None
    if "act_layer" in model:
        gelu = _activation(model["act_layer"], config)
    size, card = pixels.get("input_size"), Card(gelu, None, None, f"{config.name} says so")
    if "mean" in pixels:
        card = _card(gelu or "exact", pixels, config, config.name)._replace(gelu=gelu)
    heads = model.get("num_heads")
    if heads is None and found and found.variant and models.is_vit(found.variant):
        heads = found.num_heads or models.sizes(found.variant)["num_heads"]
    return card._replace(
        image_size=values.size(size and list(size)[1:]),
        pooling=model.get("global_pool", said.get("global_pool")),
        num_heads=heads if heads is None else values.whole(heads, "num_heads"),
        resize="bicubic",
        norm_eps=found and found.norm_eps,
        variant=(found and found.variant) or None,
    )


def _hf(said, config):
    """The card of transformers' config.json; pixels are in the processor's file beside it."""
    kind = said.get("model_type")
    default = _HF_TYPES.get(kind, _HF_TYPES["vit"])
    gated = said.get("use_gated_mlp", False)  # by SiLU, whose name stands in place of the GELU's
    if gated and said.get("hidden_act") != "silu":
        raise UserError(
            f"{config} is of another model (its gated MLPs have the activation "
            f"{said.get('hidden_act')}){_REMOVE}"
        )
    gelu = "exact" if gated else _activation(said.get("hidden_act", default.gelu), config)
    mean, std = _processor(config)
    size = said.get("image_size")
    eps, notes = values.epsilon(said.get("layer_norm_eps", default.eps)), ()
    if kind == "convnext" and eps != default.eps:  # which is its last norm's alone
        text = f"{config} gives the last norm an epsilon of {eps:g}: {default.eps:g} is taken for all"
        eps, notes = default.eps, (f"{text}, as in the original",)
    heads = said.get("num_heads" if kind in ("swin", "swinv2") else "num_attention_heads", 12)
    return Card(
        *(gelu, mean, std, f"{config.name} says so"),
        image_size=values.size(size),
        num_heads=heads if isinstance(heads, list) else values.whole(heads, "num_attention_heads"),
        norm_eps=eps,
        resize=default.resize,
        notes=notes,
    )


def _processor(config):
    """Mean and deviation for pixels in [0, 1] that transformers' processor makes; None without one."""
    path = config.with_name("preprocessor_config.json")
    if not path.exists():
        path = config.with_name("processor_config.json")
    try:
        said = json.loads(path.read_text()) if path.exists() else {}
        said = said.get("image_processor", said)
        plain = said.get("do_normalize", True) is False
        if not said or (said.get("image_mean") is None and not plain):
            return None, None
        if said.get("rescale_offset"):
            raise ValueError("it moves pixels (rescale_offset), which is not computed here")
        factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
        three = lambda x: (x,) * 3 if isinstance(x, int | float) else x
        mean, std = (
            three(0.0 if plain else said["image_mean"]),
            three(1.0 if plain else said.get("image_std")),
        )
        values.check("exact", mean, std)
        if not isinstance(factor, int | float) or not 0 < factor < 1e9:
            raise ValueError(f"its rescale_factor is {factor!r}")
    except (ValueError, AttributeError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}): replace or remove it") from e
    scale = 1.0 if math.isclose(255 * factor, 1, rel_tol=1e-4) else 255 * factor
    return tuple(x / scale for x in mean), tuple(x / scale for x in std)


def _activation(name, config):
    if name not in _ACTIVATIONS:
        names = ", ".join(_ACTIVATIONS)
        raise UserError(f"{config}: the activation {name} is none of {names}: take another model")
    return _ACTIVATIONS[name]


def _card(gelu, pixels, path, source):
    try:
        mean, std = pixels.get("mean"), pixels.get("std")
        values.check(gelu, mean, std)
    except (ValueError, AttributeError) as e:
        raise UserError(f"what {source} says of {path} is damaged ({e}): replace or remove it") from e
    return Card(gelu, tuple(mean), tuple(std), f"{source} says so")
