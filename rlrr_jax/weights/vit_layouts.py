"""Public layouts of ViT weights, to and from our tree.

In between, an array has our name with numbered blocks: `Transformer/encoderblock_0/LayerNorm_0/scale`.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from rlrr_jax.errors import UserError
from rlrr_jax.weights import state_dicts

ATTENTION, MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"
PREFIXES = ("", "params/", "opt/target/")  # of the tree to read, if an `.npz` holds several
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/")
_MOST_BLOCKS = 1000  # a longer axis is no depth, and is reported as it is
QKV = ("query", "key", "value")
# Our name of what timm calls `blocks.<i>.<name>`; `qkv` is three of ours.
TIMM_BLOCK = {
    "norm1": "LayerNorm_0",
    "attn.proj": f"{ATTENTION}/out",
    "norm2": "LayerNorm_1",
    "mlp.fc1": f"{MLP}/Dense_0",
    "mlp.fc2": f"{MLP}/Dense_1",
}
TIMM = {"patch_embed.proj": "embedding", "norm": "Transformer/encoder_norm", "head": "head"}
STEM = "embedding"  # what takes the pixels
_TIMM_STEM = "patch_embed.proj.weight"
# Of other heads, of pre-training and of trainers: the class token's path does not use them.
UNUSED = re.compile(
    r"(pre_logits|head_dist|head[./](\d+|mlp|last_layer|fc)|fc_norm|pooler|mask_token|decoder|predictor"
    r"|projector|projection|dino_head|ibot_head|optimizer|opt)\b.*|decoder_.*|(.*[./])?position_ids"
    r"|epoch|step|global_step|iteration"
)
# timm's names of what is in no block.
_TIMM_LEAVES = {
    "cls_token": "cls",
    "dist_token": "dist",
    "reg_token": "registers",
    "register_tokens": "registers",  # DINOv2's code
    "pos_embed": "pos_embedding",
    "attn_pool.latent": "MAPHead_0/probe",
}
TIMM |= {
    "projection": "projection",  # transformers' visual_projection, see `_from_clip`
    "norm_pre": "pre_norm",
    "fc_norm": "fc_norm",
    "attn_pool.proj": f"MAPHead_0/{ATTENTION}/out",
    "attn_pool.norm": "MAPHead_0/LayerNorm_0",
    "attn_pool.mlp.fc1": f"MAPHead_0/{MLP}/Dense_0",
    "attn_pool.mlp.fc2": f"MAPHead_0/{MLP}/Dense_1",
}
TIMM_BLOCK |= {"attn.q_norm": f"{ATTENTION}/query_norm", "attn.k_norm": f"{ATTENTION}/key_norm"}
_REFUSED = {
    r"rope\b.*|.*rope_embeddings.*|.*\.rotary.*": "rotary positions",
    r"blocks\.\d+\.attn\.(relative_position|rel_pos).*|.*relative_position_bias.*": (
        "relative positions in its attention"
    ),
    r"blocks\.\d+\.mlp\.(w12|w1|fc1_g)\b.*": "gated MLPs",
    r"patch_embed\.backbone\b.*": "a convolutional stem",
    r"attn_pool\.(pos_embed|q_norm|k_norm)\b.*": "positions or norms in its attention pooling",
}


def numbered(params: Any) -> dict:
    """A flat dict with numbered blocks: `encoderblock/x` [L, ...] becomes `encoderblock_0/x`, ..."""
    out = {}
    for key, value in flatten_dict(params, sep="/").items():
        if key.startswith("Transformer/encoderblock/") and value.ndim and len(value) <= _MOST_BLOCKS:
            for i, part in enumerate(value):
                out[key.replace("encoderblock", f"encoderblock_{i}", 1)] = part
        else:
            out[key] = value
    return out


def stacked(flat: dict) -> dict:
    """A flat dict with the blocks on top of each other: what `numbered` undoes."""

    def place(key: str) -> tuple | None:
        found = _BLOCK.match(key)
        return found and (key.replace(found[0], "Transformer/encoderblock/"), int(found[1]))

    return gathered(flat, place)


def gathered(flat: dict, place: Callable) -> dict:
    """Arrays of blocks on top of each other; others stay.

    Args:
      flat: arrays by name.
      place: function of a name: that of its stack and the number in it, or None.
    """
    out: dict = {}
    stacks: dict = {}
    for key, value in flat.items():
        if found := place(key):
            stacks.setdefault(found[0], {})[found[1]] = value
        else:
            out[key] = value
    return out | {name: np.stack([x[i] for i in range(len(x))]) for name, x in stacks.items()}


# From -----------------------------------------------------------------------------------------


def from_jax(flat: dict, subtree: str, path: Any) -> tuple:
    """The arrays of an `.npz` under the subtree by our names, and the names of those elsewhere.

    Layouts read: the original one of 2020 and AugReg
    (`encoderblock_<i>/MultiHeadDotProductAttention_1`, `posembed_input`, a class-token row in the
    position embedding), big_vision's with numbered and with scanned blocks; each with or
    without a prefix and a head.
    """
    if subtree:
        subtree = subtree.strip("/") + "/"
        flat = {k.removeprefix(subtree): v for k, v in flat.items() if k.startswith(subtree)}
    stem = "embedding/kernel"
    prefixes = [k.removesuffix(stem) for k in flat if k == stem or k.endswith("/" + stem)]
    if not prefixes:
        where = f"{path} has no array '{subtree}{stem}'"
        raise UserError(f"{where}: it holds no Vision Transformer there; check the name")
    preferred = [p for p in PREFIXES if p in prefixes]
    if not preferred and len(prefixes) > 1:
        choices = " or ".join(f"{path}:{subtree}{p[:-1]}" for p in prefixes)
        raise UserError(f"{path} holds several trees of weights: write {choices}")
    prefix = (preferred or prefixes)[0]
    names, outside = {}, [key for key in flat if not key.startswith(prefix)]
    for key, value in flat.items():
        if not key.startswith(prefix):
            continue
        key = key.removeprefix(prefix)
        key = key.replace("MultiHeadDotProductAttention_1/", f"{ATTENTION}/")
        key = key.replace("/LayerNorm_2/", "/LayerNorm_1/").replace("/MlpBlock_3/", f"/{MLP}/")
        key = re.sub(r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding", key)
        names[key] = value
    if "pos_embedding" not in names:
        raise UserError(
            f"{path} has no position embedding: its positions are computed (sincos2d), as ours are "
            f"not; take another"
        )
    return numbered(names), outside


def from_timm(flat: dict, num_heads: int, path: Any) -> tuple:
    """The arrays of a timm ViT (or of DINOv2's, MAE's or MoCo v3's code) by our names, and other names.

    `qkv` is taken apart, LayerScale (`ls1.gamma`) folded into the Dense before it.

    Raises UserError for what our ViT does not have.
    """
    stem = r"(.*)patch_embed\.proj\.weight"
    moco = ("", "module.base_encoder.")  # MoCo v3 keeps two
    flat, outside = state_dicts.one_model(flat, stem, path, moco)
    if _TIMM_STEM not in flat:
        raise UserError(f"{path} has no array '{_TIMM_STEM}': it is no Vision Transformer of timm's")
    flat = {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): x for key, x in flat.items()
    }  # DINOv2
    _check_attention(flat, path)
    for key in flat:
        for pattern, what in _REFUSED.items():
            if re.fullmatch(pattern, key):
                raise UserError(f"{path} has {what} ({key}), which this ViT does not: take another")
    out, gammas = {}, {}
    for key, value in flat.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            block = f"Transformer/encoderblock_{match[1]}"
            if layer := re.fullmatch(r"ls([12])\.gamma|gamma_([12])", match[2]):
                name = f"{ATTENTION}/out" if "1" in layer.groups() else f"{MLP}/Dense_1"
                gammas[f"{block}/{name}"] = value
            else:
                out |= {f"{block}/{k}": v for k, v in _timm_block(match[2], value, num_heads)}
        else:
            out |= dict(timm_outside(key, value, num_heads))
    if "embedding/kernel" in out:  # CLIP's has no bias
        out.setdefault("embedding/bias", np.zeros(out["embedding/kernel"].shape[-1:], np.float32))
    for name in [key for key in out if key.endswith("/query/kernel")]:  # without biases: zeros
        for part in QKV:
            bias = name.replace("query/kernel", f"{part}/bias")
            out.setdefault(bias, np.zeros(out[name].shape[1:], np.float32))
    return scaled(out, gammas, path), outside


def scaled(flat: dict, gammas: dict, path: Any) -> dict:
    """Arrays by our names, with the LayerScale [D] of a layer's outputs folded into it.

    Raises UserError for one of another width.
    """
    for name, gamma in gammas.items():
        for key in (f"{name}/kernel", f"{name}/bias"):
            if key in flat and gamma.shape != flat[key].shape[-1:]:
                raise UserError(f"{path}: the LayerScale of {name} has the shape {gamma.shape}")
            flat = {**flat, key: flat[key] * gamma} if key in flat else flat
    return flat


def _check_attention(flat: dict, path: Any) -> None:
    """UserError for arrays that only models with rotary or computed positions have, or lack."""
    if "pos_embed" not in flat:
        raise UserError(
            f"{path} has no position embedding: its positions are rotary or computed, as ours are "
            f"not; take another"
        )
    if "cls_token" in flat and "attn_pool.latent" in flat:
        raise UserError(
            f"{path} has attention pooling and a class token, as models with rotary positions have, "
            f"which this ViT has not: take another"
        )


def timm_outside(key: str, value: Any, num_heads: int) -> Iterator[tuple]:
    """Our names and arrays of one of timm's that is in no block; heads are those of a MAP head."""
    if key in _TIMM_LEAVES:
        yield _TIMM_LEAVES[key], value
        return
    stem, _, part = key.rpartition(".")
    attention = f"MAPHead_0/{ATTENTION}"
    if stem in ("attn_pool.q", "attn_pool.kv"):
        names = QKV[:1] if stem.endswith(".q") else QKV[1:]
        for name, array in zip(names, np.split(value, len(names))):
            heads = array.reshape(num_heads, -1, *array.shape[1:])  # [H, Dh, D] or [H, Dh]
            if part == "weight":
                yield f"{attention}/{name}/kernel", heads.transpose(2, 0, 1)
            else:
                yield f"{attention}/{name}/bias", heads
        return
    for name, array in timm_layer(key, value, TIMM):
        if name == f"{attention}/out/kernel":
            array = array.reshape(num_heads, -1, array.shape[-1])
        yield name, array


def with_head(flat: dict, model: Any) -> dict:
    """Arrays whose head fits the model: two heads of DeiT are one, CLIP's projection is kept or not."""
    out = dict(flat)
    if model.dist_token and "head_dist.weight" in out and "head/kernel" in out:
        second, bias = out.pop("head_dist.weight"), out.pop("head_dist.bias")
        out["head/kernel"] = np.concatenate([out["head/kernel"], second.T])
        out["head/bias"] = (out["head/bias"] + bias) / 2
    kernel = out.get("projection/kernel", out.get("head/kernel"))
    out.pop("projection/kernel", None)
    if model.projection and kernel is not None and kernel.shape[-1] == model.projection:
        out["projection/kernel"] = kernel
        out = {key: value for key, value in out.items() if not key.startswith("head/")}
    return out


def parts(shapes: dict[str, tuple]) -> dict[str, Any]:
    """Attributes of `vit.ViT` that differ from the plain one's, by the arrays of a file.

    Args:
      shapes: shapes by name, of any layout that is read here.
    """
    ends = lambda *ending: [key for key in shapes if key.endswith(ending)]
    out: dict[str, Any] = {}
    if not shapes:
        return out
    if found := ends("reg_token", "register_tokens"):
        out["registers"] = shapes[found[0]][1]
    if ends("dist_token", "distillation_token"):
        out |= {"dist_token": True, "pool": "both"}
    if not ends("cls_token", "class_embedding", "cls"):
        out |= {"class_token": False, "pool": "avg"}
    if ends("attn_pool.latent", "MAPHead_0/probe", "head.probe"):
        out["pool"] = "map"
    if ends("norm_pre.weight", "pre_layrnorm.weight"):
        out["pre_norm"] = True
    final = [k for k in shapes if re.fullmatch(r"(.*\.)?(norm|layernorm)\.weight", k)]
    if ends("fc_norm.weight") and not [key for key in final if "attn_pool" not in key]:
        out |= {"fc_norm": True, "pool": "avg"}
    if ends("attn.q_norm.weight"):
        out["qk_norm"] = True
    return out


def join_thirds(flat: dict, stem: str) -> dict:
    """Arrays with `<stem>.query`, `.key` and `.value` as one `<stem>.qkv`, as timm has it.

    Args:
      flat: arrays by name.
      stem: pattern of what is before, in brackets.

    Raises UserError if one of three is missing or of another size.
    """
    out: dict = {}
    thirds: dict = {}
    for key, value in flat.items():
        if match := re.fullmatch(rf"{stem}\.(query|key|value)\.(weight|bias)", key):
            thirds.setdefault((match[1], match[3]), {})[match[2]] = value
        else:
            out[key] = value
    for (name, part), arrays in thirds.items():
        if arrays.keys() != set(QKV) or len({x.shape for x in arrays.values()}) > 1:
            raise UserError(f"{name} has no query, key and value of one size: the file is damaged")
        out[f"{name}.qkv.{part}"] = np.concatenate([arrays[third] for third in QKV])
    return out


def _timm_block(name, value, num_heads):
    """Our names in a block and their arrays, of one of timm's."""
    if (
        name in ("attn.qkv.weight", "attn.qkv.bias")
        and value.ndim
        and len(value) % (3 * num_heads) == 0
    ):
        heads = value.reshape(3, num_heads, -1, *value.shape[1:])  # [3, H, Dh, D] or [3, H, Dh]
        for part, array in zip(QKV, heads):
            if array.ndim == 3:
                yield f"{ATTENTION}/{part}/kernel", array.transpose(2, 0, 1)  # [D, H, Dh]
            else:
                yield f"{ATTENTION}/{part}/bias", array
        return
    for key, array in timm_layer(name, value, TIMM_BLOCK):
        if key == f"{ATTENTION}/out/kernel" and len(array) % num_heads == 0:
            array = array.reshape(num_heads, -1, array.shape[-1])  # [H, Dh, D]
        yield key, array


def timm_layer(name: str, value: Any, known: dict) -> Iterator[tuple]:
    """Our name and array of a weight or bias; what is not known keeps its name, and is reported."""
    stem, _, part = name.rpartition(".")
    if stem not in known or part not in ("weight", "bias"):
        yield name, value
    elif part == "weight" and value.ndim == 1:
        yield f"{known[stem]}/scale", value
    else:
        axes = (2, 3, 1, 0) if value.ndim == 4 else None  # the patch embedding [D, 3, p, p]
        yield f"{known[stem]}/{'kernel' if part == 'weight' else part}", value.transpose(axes)


# To -------------------------------------------------------------------------------------------


def first_blocks(flat: dict, depth: int) -> dict:
    """Arrays by name, without those of blocks after the first so many."""
    beyond = lambda key: (found := _BLOCK.match(key)) and int(found[1]) >= depth
    return {key: value for key, value in flat.items() if not beyond(key)}


# Pixels ---------------------------------------------------------------------------------------


def fold_pixels(flat: dict, mean: Any, std: Any, name: str = "embedding") -> dict:
    """Changes a patch embedding for pixels `(x - mean) / std`, x in [0, 1], to one for [-1, 1].

    With y in [-1, 1], `(x - mean) / std = (0.5 / std) y + (0.5 - mean) / std` in each colour, which
    folds into kernel [p, p, 3, D] and bias [D]: patches are not padded.
    """
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    kernel = flat[f"{name}/kernel"].astype(np.float64)
    moved = np.einsum("hwcd,c->d", kernel, (0.5 - mean) / std)
    scaled = kernel * (0.5 / std)[:, None]
    bias = flat[f"{name}/bias"] + moved
    return {
        **flat,
        f"{name}/kernel": scaled.astype(np.float32),
        f"{name}/bias": bias.astype(np.float32),
    }
