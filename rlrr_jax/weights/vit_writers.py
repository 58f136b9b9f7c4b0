"""The tree of a ViT in the layouts of others: what `export` writes."""

import re
from typing import Any

import numpy as np

from rlrr_jax.weights.vit_layouts import ATTENTION, MLP, QKV, TIMM, TIMM_BLOCK, numbered
from rlrr_jax.weights.vit_transformers import HF_LEAF, HF_STEM


def to_big_vision(params: Any) -> dict:
    """A tree as big_vision saves it, with numbered blocks: `params/Transformer/encoderblock_0/...`."""
    return {f"params/{k}": np.asarray(v, np.float32) for k, v in numbered(params).items()}


def to_vit_jax(params: Any) -> dict:
    """A tree in the layout of 2020, `github.com/google-research/vision_transformer`.

    Its position embedding has a row for the class token; ours is in `cls`, so that row is zero.
    """
    out = {}
    for key, value in numbered(params).items():
        key = key.replace(f"{ATTENTION}/", "MultiHeadDotProductAttention_1/")
        key = key.replace("/LayerNorm_1/", "/LayerNorm_2/").replace(f"/{MLP}/", "/MlpBlock_3/")
        if key == "pos_embedding":
            key = "Transformer/posembed_input/pos_embedding"
            value = np.pad(value, ((0, 0), (1, 0), (0, 0)))
        out[key] = np.asarray(value, np.float32)
    return out


def to_timm(params: Any) -> dict:
    """A tree as the state dict of timm's `VisionTransformer`, query, key and value in one.

    A bias of the patch embedding is in the position embedding where timm has none (before a norm).
    """
    flat = numbered(params)
    out = timm_outside(flat)
    depth = len({key.split("/")[1] for key in flat if key.startswith("Transformer/encoderblock_")})
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for part, theirs in (("kernel", "weight"), ("bias", "bias")):
            out[f"blocks.{i}.attn.qkv.{theirs}"] = timm_rows(flat, f"{block}/{ATTENTION}", part, QKV)
        for theirs, ours in TIMM_BLOCK.items():
            if f"{block}/{ours}/bias" in flat:
                out |= to_timm_layer(flat, f"{block}/{ours}", f"blocks.{i}.{theirs}")
    return {key: np.ascontiguousarray(value, np.float32) for key, value in out.items()}


def timm_outside(flat: dict) -> dict:
    """What is in no block, by timm's names.

    Args:
      flat: arrays by our names, with numbered blocks.
    """
    out = _to_timm_tokens(flat)
    for theirs, ours in TIMM.items():
        if f"{ours}/kernel" in flat or f"{ours}/scale" in flat:
            out |= to_timm_layer(flat, ours, theirs)
    if "pre_norm/scale" in flat:
        place = np.array(out["pos_embed"])  # the patches' rows are behind the class token's
        place[:, int("cls" in flat) :] += out.pop("patch_embed.proj.bias")
        out["pos_embed"] = place
    if "dist" in flat:  # two heads, whose mean ours is
        first, second = np.split(out["head.weight"], 2, axis=1)
        out |= {"head.weight": first, "head_dist.weight": second, "head_dist.bias": out["head.bias"]}
    pool = f"MAPHead_0/{ATTENTION}"
    if f"{pool}/query/kernel" in flat:
        out["attn_pool.latent"] = flat["MAPHead_0/probe"]
        for part, theirs in (("kernel", "weight"), ("bias", "bias")):
            out[f"attn_pool.q.{theirs}"] = timm_rows(flat, pool, part, QKV[:1])
            out[f"attn_pool.kv.{theirs}"] = timm_rows(flat, pool, part, QKV[1:])
    return out


def timm_rows(flat: dict, attention: str, part: str, names: tuple) -> np.ndarray:
    """Kernels [n D, D] or biases [n D] of some of query, key and value, as timm has them."""
    heads = [np.asarray(flat[f"{attention}/{name}/{part}"]) for name in names]
    return np.concatenate(
        [x.reshape(len(x), -1).T if part == "kernel" else x.reshape(-1) for x in heads]
    )


def _to_timm_tokens(flat):
    """Tokens and position embedding; with registers timm has no positions of tokens."""
    names = {"cls": "cls_token", "dist": "dist_token", "registers": "reg_token"}
    out = {theirs: flat[ours] for ours, theirs in names.items() if ours in flat}
    if "pos_embedding" not in flat:
        return out
    position = np.asarray(flat["pos_embedding"])
    rows = 0 if "registers" in flat else sum(x.shape[1] for x in out.values())
    return {**out, "pos_embed": np.pad(position, ((0, 0), (rows, 0), (0, 0)))}


def to_timm_layer(flat: dict, ours: str, theirs: str) -> dict:
    """Weight and bias of a Dense, LayerNorm or patch embedding."""
    bias = np.asarray(flat.get(f"{ours}/bias", ()))
    if f"{ours}/scale" in flat:
        return {f"{theirs}.weight": np.asarray(flat[f"{ours}/scale"]), f"{theirs}.bias": bias}
    kernel = np.asarray(flat[f"{ours}/kernel"])
    if kernel.ndim == 3:  # [H, Dh, D]
        kernel = kernel.reshape(-1, kernel.shape[-1])
    axes = (3, 2, 0, 1) if kernel.ndim == 4 else None  # the patch embedding [p, p, 3, D]
    return {f"{theirs}.weight": kernel.transpose(axes), f"{theirs}.bias": bias}


def to_transformers(params: Any) -> dict:
    """A tree as the state dict of transformers' `ViTForImageClassification`."""
    stems = {"patch_embed.proj": f"vit.{HF_STEM}", "norm": "vit.layernorm", "head": "classifier"}
    block_stems = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    out = {}
    for key, value in to_timm(params).items():
        stem, _, part = key.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if key in ("cls_token", "pos_embed"):
            (name,) = (ours for ours, theirs in HF_LEAF.items() if theirs == key)
            out[f"vit.{name}"] = value
        elif block is None:
            out[f"{stems[stem]}.{part}"] = value
        elif block[2] == "attn.qkv":
            for name, rows in zip(QKV, np.split(value, 3)):
                out[f"vit.encoder.layer.{block[1]}.attention.attention.{name}.{part}"] = rows
        else:
            out[f"vit.encoder.layer.{block[1]}.{block_stems[block[2]]}.{part}"] = value
    return {key: np.ascontiguousarray(value) for key, value in out.items()}
