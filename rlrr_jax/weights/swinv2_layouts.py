"""Public layouts of Swin V2's weights: both generations of timm's names and transformers'; to our tree.

What is as in a Swin is read by `swin_layouts`.
"""

import re
from typing import Any

import numpy as np

from rlrr_jax.errors import UserError
from rlrr_jax.models.swinv2 import coordinates
from rlrr_jax.weights import swin_layouts
from rlrr_jax.weights.swin_layouts import STEM, UNUSED, numbered, stacked
from rlrr_jax.weights.vit_layouts import QKV
from rlrr_jax.weights.vit_writers import timm_rows, to_timm_layer

__all__ = ["STEM", "UNUSED", "numbered", "stacked"]  # what `reader` asks a module of layouts for
_ATTENTION, _CPB = "WindowAttention_0", {"0": "cpb_0", "2": "cpb_1"}
_HF_PREFIX, _HF_MLP = "swinv2.", "continuous_position_bias_mlp"


def from_torch(flat: dict, model: Any, path: Any) -> tuple:
    """The arrays of a state dict by our names, and the names of arrays outside of the model.

    Raises UserError if there is none of a Swin V2, or one whose buffers show other windows.
    """
    for key, table in flat.items():
        if re.search(r"layers\.0\.blocks\.0\..*relative_coords_table", key):
            ours = coordinates(model.window, model.block_options(0)["pretrained_window"])
            if table.size != ours.size or not np.allclose(table.reshape(-1, 2), ours, atol=0.01):
                raise UserError(
                    f"{path} has windows of {(table.shape[1] + 1) // 2} tokens or was pretrained with "
                    f"others than the model ({key}): check config.model.variant"
                )
    if not any(key.endswith(("attn.logit_scale", "self.logit_scale")) for key in flat):
        raise UserError(f"{path} holds no Swin V2 (no logit_scale): check config.model.variant")
    if swin_layouts.of_transformers(flat):
        flat = swin_layouts.renamed({k.removeprefix(_HF_PREFIX): x for k, x in flat.items()})
    found, outside = swin_layouts.named(flat, path)
    out = {key: x for key, x in found.items() if not key.endswith("/reduction/bias")}
    heads = {
        key.removesuffix("/attn.logit_scale"): x.size
        for key, x in out.items()
        if key.endswith("/attn.logit_scale")
    }
    for block, number in heads.items():
        own = [key for key in out if key.startswith((f"{block}/attn.", f"{block}/{_ATTENTION}/qkv"))]
        for key in own:
            name, value = key.removeprefix(f"{block}/"), out.pop(key)
            out |= {f"{block}/{_ATTENTION}/{k}": x for k, x in _layer(name, value, number)}
    return out, outside


def _layer(name: str, value: Any, heads: int) -> Any:
    """Our names in attention and arrays, of what `swin_layouts` has not of a Swin V2."""
    apart = lambda x: x.reshape(*x.shape[:-1], heads, -1)
    if name == "attn.logit_scale":
        yield "logit_scale", value.reshape(-1)
    elif match := re.fullmatch(rf"attn\.(?:cpb_mlp|{_HF_MLP})\.([02])\.(weight|bias)", name):
        yield f"{_CPB[match[1]]}/{'kernel' if match[2] == 'weight' else 'bias'}", value.T
    elif name in ("attn.q_bias", "attn.v_bias"):
        yield f"{'query' if 'q_' in name else 'value'}/bias", value.reshape(heads, -1)
    elif name == f"{_ATTENTION}/qkv/kernel":
        yield from zip((f"{third}/kernel" for third in QKV), map(apart, np.split(value, 3, -1)))
    elif match := re.fullmatch(r"attn\.(query|key|value)\.(weight|bias)", name):
        yield f"{match[1]}/{'kernel' if match[2] == 'weight' else 'bias'}", apart(value.T)
    else:
        yield name, value  # reported as unknown


def to_timm(params: Any) -> dict:
    """A tree as the state dict of timm's `SwinTransformerV2`."""
    flat, out = numbered(params), {}
    for theirs, ours in swin_layouts.REST.items():
        out |= to_timm_layer(flat, ours, theirs) if theirs != "head" else {}  # its older name
    for key, scale in flat.items():
        if match := re.fullmatch(rf"stage_(\d+)/block_(\d+)/{_ATTENTION}/logit_scale", key):
            block, ours = f"layers.{match[1]}.blocks.{match[2]}", f"stage_{match[1]}/block_{match[2]}"
            attention = f"{ours}/{_ATTENTION}"
            out[f"{block}.attn.logit_scale"] = np.reshape(scale, (-1, 1, 1))
            out[f"{block}.attn.qkv.weight"] = timm_rows(flat, attention, "kernel", QKV)
            for third in ("query", "value"):
                out[f"{block}.attn.{third[0]}_bias"] = timm_rows(flat, attention, "bias", (third,))
            out[f"{block}.attn.cpb_mlp.0.weight"] = np.transpose(flat[f"{attention}/cpb_0/kernel"])
            out[f"{block}.attn.cpb_mlp.0.bias"] = flat[f"{attention}/cpb_0/bias"]
            out[f"{block}.attn.cpb_mlp.2.weight"] = np.transpose(flat[f"{attention}/cpb_1/kernel"])
            for theirs, name in swin_layouts.BLOCK.items():
                if theirs != "attn.qkv":
                    out |= to_timm_layer(flat, f"{ours}/{name}", f"{block}.{theirs}")
        elif match := re.fullmatch(r"stage_(\d+)/merge/reduction/kernel", key):
            theirs = f"layers.{int(match[1]) + 1}.downsample"
            out[f"{theirs}.reduction.weight"] = np.transpose(scale)
            out |= to_timm_layer(flat, f"stage_{match[1]}/merge/norm", f"{theirs}.norm")
    return {key: np.ascontiguousarray(value, np.float32) for key, value in out.items()}
