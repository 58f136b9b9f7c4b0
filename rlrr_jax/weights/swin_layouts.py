"""Public layouts of Swin weights, to and from our tree.

Read are the official files (`.pth` converted to safetensors), both generations of timm's names (merging
at the end of a stage, or at the start of the next) and transformers'. In between, an array has our name
with numbered blocks: `stage_0/block_1/LayerNorm_0/scale`.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from rlrr_jax.errors import UserError
from rlrr_jax.weights import state_dicts
from rlrr_jax.weights.vit_layouts import gathered, join_thirds, timm_layer
from rlrr_jax.weights.vit_writers import to_timm_layer

STEM = "patch_embed/proj"  # what takes the pixels
_ATTENTION, _MLP = "WindowAttention_0", "MlpBlock_0"
_TABLE = "relative_position_bias_table"
_V2 = "windows of 8; swinv2_b_12to16: of 16, pretrained with 12"
_KINDS = ("plain", "shifted")
# Our name of what timm calls `layers.<s>.blocks.<j>.<name>`.
BLOCK = {
    "norm1": "LayerNorm_0",
    "attn.qkv": f"{_ATTENTION}/qkv",
    "attn.proj": f"{_ATTENTION}/out",
    "norm2": "LayerNorm_1",
    "mlp.fc1": f"{_MLP}/Dense_0",
    "mlp.fc2": f"{_MLP}/Dense_1",
}
REST = {
    "patch_embed.proj": "patch_embed/proj",
    "patch_embed.norm": "patch_embed/norm",
    "norm": "norm",
    "head": "head",
    "head.fc": "head",
}
_STEM = "patch_embed.proj.weight"
# Buffers that can be computed (the second is of Swin V2), and what pre-training had besides.
UNUSED = re.compile(
    r".*[./](relative_position_index|relative_coords_table|attn_mask|mask_token)"
    r"|decoder\..*|hidden_states_norms\..*"
)
# transformers' names -> timm's older ones.
_HF = (
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.norm", "patch_embed.norm"),
    (r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.layernorm_before", r"layers.\1.blocks.\2.norm1"),
    (r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.layernorm_after", r"layers.\1.blocks.\2.norm2"),
    (
        r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.self\.(query|key|value)",
        r"layers.\1.blocks.\2.attn.\3",
    ),
    (r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.self(.*)", r"layers.\1.blocks.\2.attn\3"),
    (
        r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.output\.dense",
        r"layers.\1.blocks.\2.attn.proj",
    ),
    (r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.intermediate\.dense", r"layers.\1.blocks.\2.mlp.fc1"),
    (r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.output\.dense", r"layers.\1.blocks.\2.mlp.fc2"),
    (r"encoder\.layers\.(\d+)\.downsample\.(norm|reduction)", r"layers.\1.downsample.\2"),
    (r"layernorm", "norm"),
    (r"classifier", "head"),
)


def numbered(params: Any) -> dict:
    """A flat dict with numbered blocks: `stage_0/encoderblock/shifted/x` is `stage_0/block_1/x`, ..."""
    out = {}
    for key, value in flatten_dict(params, sep="/").items():
        match = re.match(r"(stage_\d+)/encoderblock/(\w+)/", key)
        for i, part in enumerate(value) if match else ():
            number = 2 * i + _KINDS.index(match[2])
            out[key.replace(match[0], f"{match[1]}/block_{number}/")] = part
        if not match:
            out[key] = value
    return out


def stacked(flat: dict) -> dict:
    """A flat dict with the blocks on top of each other: what `numbered` undoes."""

    def place(key: str) -> tuple | None:
        if found := re.match(r"(stage_\d+)/block_(\d+)/", key):
            pair, kind = divmod(int(found[2]), 2)
            return key.replace(found[0], f"{found[1]}/encoderblock/{_KINDS[kind]}/"), pair
        return None

    return gathered(flat, place)


def from_torch(flat: dict, model: Any, path: Any) -> tuple:
    """The arrays of a Swin's state dict by our names, and the names of arrays outside of it.

    Raises UserError if there is none, or one of a Swin V2.
    """
    del model  # all have the same names
    if any(key.endswith("logit_scale") for key in flat):
        raise UserError(
            f"{path} is of a Swin V2: set config.model.variant to one, such as swinv2_b ({_V2})"
        )
    return named(_from_transformers(flat), path)


def named(flat: dict, path: Any) -> tuple:
    """The arrays of timm's or the official names by ours, and the names of arrays outside of the model.

    Those that are no Swin's keep their name in a block. Raises UserError without a stem.
    """
    flat, outside = state_dicts.one_model(flat, r"(.*)patch_embed\.proj\.weight", path)
    if _STEM not in flat or "patch_embed.norm.weight" not in flat:
        raise UserError(
            f"{path} holds no Swin Transformer (no {_STEM} with a norm): check config.model"
        )
    last = max([int(m[1]) for key in flat if (m := re.match(r"layers\.(\d+)\.", key))], default=0)
    newer = any(key.startswith(f"layers.{last}.downsample") for key in flat)
    out = {}
    for key, value in flat.items():
        if match := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            block = f"stage_{match[1]}/block_{match[2]}"
            if match[3] == f"attn.{_TABLE}":
                out[f"{block}/{_ATTENTION}/{_TABLE}"] = value
            else:
                out |= {f"{block}/{k}": v for k, v in timm_layer(match[3], value, BLOCK)}
        elif match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", key):
            stage = f"stage_{int(match[1]) - newer}/merge"
            known = {"norm": f"{stage}/norm", "reduction": f"{stage}/reduction"}
            out |= dict(timm_layer(match[2], value, known))
        else:
            out |= dict(timm_layer(key, value, REST))
    for key in [key for key in out if key.endswith("/reduction/kernel")]:  # which public files have not
        out.setdefault(key.replace("kernel", "bias"), np.zeros(out[key].shape[1:], np.float32))
    return out, outside


def of_transformers(names: Iterable[str]) -> bool:
    """Whether these are names of transformers' Swin."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names)


def _from_transformers(flat):
    """Arrays by timm's names, of transformers'; others stay as they are."""
    if not of_transformers(flat):
        return flat
    named = renamed({key.removeprefix("swin."): value for key, value in flat.items()})
    return join_thirds(named, r"(layers\.\d+\.blocks\.\d+\.attn)")


def renamed(flat: dict) -> dict:
    """Arrays of transformers' by timm's names, query, key and value apart."""
    named = {}
    for key, value in flat.items():
        stem, _, part = key.rpartition(".")
        for pattern, theirs in _HF:
            if match := re.fullmatch(pattern, stem):
                stem = match.expand(theirs)
                break
        named[f"{stem}.{part}"] = value
    return named


def to_timm(params: Any) -> dict:
    """A tree as the state dict of timm's `SwinTransformer` (0.9 and later).

    Its merging has no bias. Ours is folded into the LayerNorm before it: the least change of that
    norm's bias that the merging's kernel turns into it.
    """
    flat = numbered(params)
    out = {}
    for theirs, ours in REST.items():
        out |= to_timm_layer(flat, ours, theirs) if theirs != "head" else {}  # its older name
    for key, table in flat.items():
        if match := re.fullmatch(rf"stage_(\d+)/block_(\d+)/{_ATTENTION}/{_TABLE}", key):
            block = f"layers.{match[1]}.blocks.{match[2]}"
            out[f"{block}.attn.{_TABLE}"] = table
            for theirs, ours in BLOCK.items():
                ours = f"stage_{match[1]}/block_{match[2]}/{ours}"
                out |= to_timm_layer(flat, ours, f"{block}.{theirs}")
        elif match := re.fullmatch(r"stage_(\d+)/merge/reduction/kernel", key):
            merge, theirs = f"stage_{match[1]}/merge", f"layers.{int(match[1]) + 1}.downsample"
            kernel = np.asarray(table, np.float64)
            bias = np.asarray(flat[f"{merge}/reduction/bias"], np.float64)
            moved = np.linalg.lstsq(kernel.T, bias)[0] if bias.any() else 0
            out[f"{theirs}.reduction.weight"] = np.asarray(table).T
            out[f"{theirs}.norm.weight"] = flat[f"{merge}/norm/scale"]
            out[f"{theirs}.norm.bias"] = np.asarray(flat[f"{merge}/norm/bias"]) + moved
    return {key: np.ascontiguousarray(value, np.float32) for key, value in out.items()}
