"""ViTs of transformers, and CLIP's image encoders, by way of timm's names."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from rlrr_jax.errors import UserError
from rlrr_jax.weights.vit_layouts import QKV, from_timm, join_thirds

# transformers' names in a block -> timm's.
_HF_BLOCK = {
    r"attention\.(?:attention\.)?(query|key|value)": "attn.{}",
    r"attention\.([qkv])_proj": "attn.{}",
    r"attention\.(?:output\.dense|o_proj)": "attn.proj",
    r"layernorm_before|norm1": "norm1",
    r"layernorm_after|norm2": "norm2",
    r"intermediate\.dense|mlp\.fc1": "mlp.fc1",
    r"output\.dense|mlp\.fc2": "mlp.fc2",
}


HF_LEAF = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.mask_token": "mask_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
}


_HF_STEMS = {
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}


HF_STEM = "embeddings.patch_embeddings.projection"


def from_torch(flat: dict, model: Any, path: Any) -> tuple:
    """The arrays of a ViT's state dict of any layout that is read, as `from_timm`'s."""
    read = from_timm
    if of_transformers(flat):
        read = from_transformers
    elif of_clip(flat):
        read = from_clip
    return read(flat, model.num_heads, path)


def of_transformers(names: Iterable[str]) -> bool:
    """Whether these are names of transformers' ViT or Dinov2."""
    return any(name.endswith(f"{HF_STEM}.weight") for name in names)


def from_transformers(flat: dict, num_heads: int, path: Any) -> tuple:
    """The arrays of a ViT or Dinov2 of transformers (both its generations of names) as `from_timm`'s.

    Raises UserError as `from_timm` does.
    """
    stems = [key.removesuffix(f"{HF_STEM}.weight") for key in flat if key.endswith(f"{HF_STEM}.weight")]
    if len(stems) > 1:
        raise UserError(f"{path} holds several models ({', '.join(stems)}): keep one of them")
    named = {}
    for key, value in flat.items():
        key = key.removeprefix(stems[0])
        stem, _, part = key.rpartition(".")
        known = {HF_STEM: "patch_embed.proj", **_HF_STEMS}
        block = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", stem)
        if block and re.fullmatch(r"layer_scale[12]\.lambda1", f"{block[2]}.{part}"):
            named[f"blocks.{block[1]}.ls{block[2][-1]}.gamma"] = value
        elif block:
            named[f"blocks.{block[1]}.{_hf_block(block[2])}.{part}"] = value
        else:
            named[HF_LEAF.get(key, f"{known.get(stem, stem)}.{part}".lstrip("."))] = value
    return from_timm(join_thirds(named, r"(blocks\.\d+\.attn)"), num_heads, path)


# transformers' names of the vision models of CLIP and SigLIP -> timm's.
_CLIP = (
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.patch_embedding\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),
    (r"post_layernorm\.(weight|bias)", r"norm.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.", r"blocks.\1.attn.query."),
    (r"encoder\.layers\.(\d+)\.self_attn\.k_proj\.", r"blocks.\1.attn.key."),
    (r"encoder\.layers\.(\d+)\.self_attn\.v_proj\.", r"blocks.\1.attn.value."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
)


_CLIP_STEM = "embeddings.patch_embedding.weight"


def of_clip(names: Iterable[str]) -> bool:
    """Whether these are names of a vision model of CLIP or SigLIP in transformers."""
    return any(name.endswith(_CLIP_STEM) for name in names)


def from_clip(flat: dict, num_heads: int, path: Any) -> tuple:
    """The arrays of CLIP's or SigLIP's vision model in transformers as `from_timm`'s."""
    (stem,) = [key.removesuffix(_CLIP_STEM) for key in flat if key.endswith(_CLIP_STEM)]
    named, outside = {}, []
    for key, value in flat.items():
        if key == "visual_projection.weight":
            named["projection.weight"] = value
        elif not key.startswith(stem):
            outside.append(key)
        elif match := re.fullmatch(r"head\.attention\.in_proj_(weight|bias)", key.removeprefix(stem)):
            query, key_value = np.split(value, [len(value) // 3])
            named |= {f"attn_pool.q.{match[1]}": query, f"attn_pool.kv.{match[1]}": key_value}
        else:
            name = key.removeprefix(stem)
            for pattern, theirs in _CLIP:
                name = re.sub(rf"^{pattern}", theirs, name)
            lead = {"cls_token": (1, 1), "pos_embed": (1,)}.get(name, ())
            named[name] = value.reshape(*lead, *value.shape)
    found, more = from_timm(join_thirds(named, r"(blocks\.\d+\.attn)"), num_heads, path)
    return found, [*outside, *more]


def _hf_block(name):
    """timm's name of a layer in a block; one that is not known keeps its own, and is reported."""
    for pattern, theirs in _HF_BLOCK.items():
        if match := re.fullmatch(pattern, name):
            third = [name for name in QKV if match.groups() and name[0] == match[1][0]]
            return theirs.format(*third)
    return name
