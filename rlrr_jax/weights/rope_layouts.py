"""Layouts of ViTs with rotary positions: timm's, and of DINOv3 transformers' and its own; to our tree.

All are brought to timm's names with query, key and value apart (`attn.q_proj`), then to ours.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlrr_jax.errors import UserError
from rlrr_jax.models import rope_vit
from rlrr_jax.weights import state_dicts, vit_layouts
from rlrr_jax.weights.vit_layouts import ATTENTION, MLP, QKV, numbered, stacked
from rlrr_jax.weights.vit_writers import timm_outside, timm_rows, to_timm_layer

__all__ = ["STEM", "UNUSED", "numbered", "stacked"]  # what `reader` asks a module of layouts for
STEM = vit_layouts.STEM
_BLOCK = {
    "norm1": "LayerNorm_0",
    **{f"attn.{name[0]}_proj": f"{ATTENTION}/{name}" for name in QKV},
    "attn.proj": f"{ATTENTION}/out",
    "norm2": "LayerNorm_1",
    "mlp.fc1_g": f"{MLP}/gate",
    "mlp.fc1_x": f"{MLP}/Dense_0",
    "mlp.fc1": f"{MLP}/Dense_0",
    "mlp.norm": f"{MLP}/LayerNorm_0",
    "mlp.fc2": f"{MLP}/Dense_1",
}
# The authors' names (facebookresearch/dinov3), then those of transformers -> timm's.
_DINO = (
    (r"storage_tokens", "reg_token"),
    (r"(blocks\.\d+)\.ls([12])\.gamma", r"\1.gamma_\2"),
    (r"(blocks\.\d+\.mlp)\.w1\b", r"\1.fc1_g"),
    (r"(blocks\.\d+\.mlp)\.w2\b", r"\1.fc1_x"),
    (r"(blocks\.\d+\.mlp)\.w3\b", r"\1.fc2"),
)
_TRANSFORMERS = (
    (r"embeddings\.(cls|mask)_token", r"\1_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"(?:model\.)?layer\.(\d+)\.", r"blocks.\1."),
    (r"(blocks\.\d+)\.layer_scale([12])\.lambda1", r"\1.gamma_\2"),
    (r"(blocks\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.attention\.", r"\1.attn."),
    (r"(blocks\.\d+\.mlp)\.gate_proj\.", r"\1.fc1_g."),
    (r"(blocks\.\d+\.mlp)\.down_proj\.", r"\1.fc2."),
)
_TOKENS = {"cls_token": "cls", "reg_token": "registers"}
_STEM, _HF_STEM = "patch_embed.proj.weight", "embeddings.patch_embeddings.weight"
# Of pre-training, and buffers: `local_cls_norm` is for the class tokens of small crops.
UNUSED = re.compile(
    rf"{vit_layouts.UNUSED.pattern}|mask_token|rope_embed\.periods|local_cls_norm\..*|projectors\..*"
)
# Names that only a model with rotary positions has.
_OWN = re.compile(
    r"(.*\.)?(rope_embed\.periods|storage_tokens|embeddings\.patch_embeddings\.weight"
    r"|blocks\.0\.(mlp\.fc1_g\.weight|attn\.q_bias))"
)


def of_rope(names: Any) -> bool:
    """Whether arrays of these names are of a ViT with rotary positions."""
    ends = lambda ending: any(name.endswith(ending) for name in names)
    registers = ends("reg_token") and ends("blocks.0.gamma_1") and not ends("pos_embed")
    pooled = ends("attn_pool.latent") and ends("norm_pre.weight")  # PE-core
    return registers or pooled or any(_OWN.fullmatch(name) for name in names)


def variant_of(flat: dict) -> str | None:
    """The variant of arrays by name, of a layout that is read here; None: of none."""
    stem = [np.shape(x) for key, x in flat.items() if key.endswith((_STEM, _HF_STEM))]
    blocks = {m[2] for key in flat if (m := re.match(r"(.*\.)?(?:blocks|layer)\.(\d+)\.", key))}
    gated = any(re.search(r"\.mlp\.(w1|fc1_g|gate_proj)\.", key) for key in flat)
    embedded = any(key.endswith("pos_embed") for key in flat)
    packed = embedded and any(key.endswith("attn.q_bias") for key in flat)  # the smaller of EVA-02
    for name, own in rope_vit.VARIANTS.items():
        shape = (own["width"], 3, own["patch_size"], own["patch_size"])
        kind = own["depth"], own.get("gated", False), own.get("embedded", False)
        if stem == [shape] and kind == (len(blocks), gated or packed, embedded):
            return name
    return None


def check_variant(flat: dict, model: Any, path: Any) -> None:
    """UserError, naming it, if a file with rotary positions is of another variant than a model."""
    variant = variant_of(flat) if of_rope(flat) else None
    if variant is None:
        return
    theirs = rope_vit.RopeViT(**rope_vit.VARIANTS[variant], num_classes=1)
    kind = lambda model: [
        getattr(model, key, None) for key in ("width", "gated", "mlp_norm", "embedded")
    ]
    if kind(model) != kind(theirs):
        raise UserError(f"{path} is of {variant}: set config.model.variant={variant}")


def from_torch(flat: dict, model: Any, path: Any) -> tuple:
    """The arrays of a state dict by our names, and the names of those outside the model.

    Raises UserError for what such a model does not have.
    """
    stem = rf"(.*?)(?:{re.escape(_STEM)}|{re.escape(_HF_STEM)})"
    flat, outside = state_dicts.one_model(flat, stem, path)
    if not {_STEM, _HF_STEM} & flat.keys():
        raise UserError(f"{path} has no array '{_STEM}': it is no Vision Transformer of timm's")
    if ("pos_embed" in flat) != model.embedded:
        has = ("no position embedding", "a position embedding")["pos_embed" in flat]
        raise UserError(f"{path} has {has}, unlike the model: check config.model.variant")
    _check_periods(flat, model, path)
    named = _timm_names(flat, _TRANSFORMERS if _HF_STEM in flat else _DINO)
    tokens = {name: np.shape(named[key])[-2] for key, name in _TOKENS.items() if key in named}
    if tokens != model.tokens() or ("fc_norm.weight" in named) > model.fc_norm:
        raise UserError(
            f"{path} has other tokens or norms ({tokens}) than the model ({model.tokens()}): its "
            f"rotary positions may be of another kind; take another"
        )
    out, gammas, pool_heads = {}, {}, model.pool_heads or model.num_heads
    for key, value in _apart(named, model, path):
        if place := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            start = f"Transformer/encoderblock_{place[1]}/"
            if layer := re.fullmatch(r"gamma_([12])", place[2]):
                gammas[start + (f"{ATTENTION}/out" if layer[1] == "1" else f"{MLP}/Dense_1")] = value
                continue
            for name, array in vit_layouts.timm_layer(place[2], value, _BLOCK):
                out[start + name] = _heads(name, array, model.num_heads)
        else:
            out |= dict(vit_layouts.timm_outside(key, value, pool_heads))
    kernels = {key: x for key, x in out.items() if key.endswith(("/query/kernel", "embedding/kernel"))}
    for name, kernel in kernels.items():  # without biases: zeros
        names = [x for x in QKV if x[0] in model.qkv_bias] if "/query/" in name else ["embedding"]
        shape = kernel.shape[1:] if "/query/" in name else kernel.shape[-1:]
        start = name.removesuffix("query/kernel").removesuffix("embedding/kernel")
        for layer in names:
            out.setdefault(f"{start}{layer}/bias", np.zeros(shape, np.float32))
    return vit_layouts.scaled(out, gammas, path), outside


def _timm_names(flat: dict, rules: tuple) -> dict:
    """Arrays by timm's names, whose own pass."""
    out = {}
    for key, value in flat.items():
        for pattern, theirs in rules:
            key = re.sub(rf"^{pattern}", theirs, key)
        out[key] = value
    gated = any(".mlp.fc1_g." in key for key in out)  # of transformers, which says "up" of both
    up = "mlp.fc1_x." if gated else "mlp.fc1."
    return {key.replace("mlp.up_proj.", up): value for key, value in out.items()}


def _check_periods(flat: dict, model: Any, path: Any) -> None:
    """UserError if a file's periods are not the model's, which are computed here in float32.

    The authors' files of DINOv3 have them rounded to bfloat16.
    """
    periods = flat.get("rope_embed.periods")
    if periods is None:
        return
    ours = model.rotary.base ** (np.arange(len(periods)) / len(periods))
    if not np.allclose(periods, ours, rtol=0.01):
        raise UserError(
            f"{path} has rotary positions of other periods (rope_embed.periods), which are not "
            f"computed here: take another"
        )


def _apart(flat: dict, model: Any, path: Any) -> Iterator[tuple]:
    """Arrays by name, with query, key and value apart, and the halves of a packed gated MLP.

    Raises UserError for a bias of keys that the model has not.
    """
    for key, value in flat.items():
        start, _, name = key.rpartition("attn.")
        block, _, layer = key.rpartition("mlp.")
        if block and layer.startswith("fc1.") and model.gated and len(value) % 2 == 0:
            for half, array in zip(("fc1_g", "fc1_x"), np.split(value, 2)):
                yield f"{block}mlp.{half}.{layer[4:]}", array
        elif name in ("q_bias", "v_bias"):
            yield f"{start}attn.{name[0]}_proj.bias", value
        elif name in ("qkv.weight", "qkv.bias") and len(value) % 3 == 0:
            value = value * flat.get(f"{key}_mask", 1) if name == "qkv.bias" else value
            for third, array in zip("qkv", np.split(value, 3)):
                if name == "qkv.weight" or third in model.qkv_bias or third != "k":
                    yield f"{start}attn.{third}_proj.{name[4:]}", array
                elif np.any(array):
                    raise UserError(f"{path} has a bias of keys ({key}), which this model has not")
        elif name != "qkv.bias_mask":
            yield key, value


def _heads(name: str, array: Any, number: int) -> Any:
    """An array of attention with its heads apart; others, and those they do not divide, as they are."""
    layer, _, part = name.removeprefix(f"{ATTENTION}/").partition("/")
    if layer in QKV and array.shape[-1] % number == 0:
        return array.reshape(*array.shape[:-1], number, -1)
    if (layer, part) == ("out", "kernel") and len(array) % number == 0:
        return array.reshape(number, -1, array.shape[-1])
    return array


def to_timm(params: Any) -> dict:
    """A tree as the state dict of timm's `Eva` of that variant: of DINOv3, with biases (`_qkvb`)."""
    flat = numbered(params)
    out, dino = timm_outside(flat), "pos_embedding" not in flat
    depth = len({key.split("/")[1] for key in flat if key.startswith("Transformer/encoderblock_")})
    for i in range(depth):
        block, theirs = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        gated = f"{block}/{MLP}/gate/kernel" in flat
        normed = f"{block}/{MLP}/LayerNorm_0/scale" in flat  # the larger of EVA-02
        for name, ours in _BLOCK.items():
            mine = {f"{block}/{ours}/{part}" for part in ("kernel", "scale")} & flat.keys()
            if mine and name != ("mlp.fc1" if gated else "mlp.fc1_x") and "_proj" not in name:
                out |= to_timm_layer(flat, f"{block}/{ours}", f"{theirs}.{name}")
        if gated and not dino and not normed:
            for part in ("weight", "bias"):
                halves = [out.pop(f"{theirs}.mlp.{half}.{part}") for half in ("fc1_g", "fc1_x")]
                out[f"{theirs}.mlp.fc1.{part}"] = np.concatenate(halves)
        out |= _timm_attention(flat, f"{block}/{ATTENTION}", f"{theirs}.attn", fused=not normed)
        if dino:  # folded, see `from_torch`
            ones = np.ones(flat["Transformer/encoder_norm/scale"].shape)
            out |= {f"{theirs}.gamma_1": ones, f"{theirs}.gamma_2": ones}
    return {key: np.ascontiguousarray(value, np.float32) for key, value in out.items()}


def _timm_attention(flat: dict, attention: str, theirs: str, fused: bool) -> dict:
    """Query, key and value of a block by timm's names: in one, or apart."""
    rows = {}
    for name in QKV:
        rows[f"{name[0]}_proj.weight"] = timm_rows(flat, attention, "kernel", (name,))
        if f"{attention}/{name}/bias" in flat:
            rows[f"{name[0]}_proj.bias"] = timm_rows(flat, attention, "bias", (name,))
    if not fused:
        return {f"{theirs}.{key}": value for key, value in rows.items()}
    biases = {name: rows[f"{name}_proj.bias"] for name in "qkv" if f"{name}_proj.bias" in rows}
    out = {"qkv.weight": np.concatenate([rows[f"{name}_proj.weight"] for name in "qkv"])}
    if len(biases) == 3:
        out["qkv.bias"] = np.concatenate(list(biases.values()))
    else:
        out |= {f"{name}_bias": value for name, value in biases.items()}
    return {f"{theirs}.{key}": value for key, value in out.items()}
