"""Public layouts of ConvNeXt's weights: timm's, the official, transformers' and DINOv3's; to our tree.

In between, an array has our name with numbered blocks: `stage_0/block_1/LayerNorm_0/scale`.
"""

import re
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from rlrr_jax.errors import UserError
from rlrr_jax.weights import state_dicts, vit_layouts
from rlrr_jax.weights.vit_writers import to_timm_layer

STEM = "patch_embed/proj"  # what takes the pixels
_MLP = "MlpBlock_0"
# timm's names of layers -> ours.
_REST = {
    "stem.0": "patch_embed/proj",
    "stem.1": "patch_embed/norm",
    "head.norm": "norm",
    "head.fc": "head",
}
_BLOCK = {
    "conv_dw": "dwconv",
    "norm": "LayerNorm_0",
    "mlp.fc1": f"{_MLP}/Dense_0",
    "mlp.fc2": f"{_MLP}/Dense_1",
}
# The official names and DINOv3's, then transformers' of both -> timm's.
_OTHERS = (
    (r"model\.", ""),
    (r"embeddings\.patch_embeddings\.", "stem.0."),
    (r"embeddings\.layernorm\.", "stem.1."),
    (r"encoder\.stages\.", "stages."),
    (r"(stages\.\d+)\.layers\.", r"\1.blocks."),
    (r"(stages\.\d+)\.(\d+)\.", r"\1.blocks.\2."),
    (r"(?:downsample_layers|stages)\.0\.(?:downsample_layers\.)?([01])\.(?!\d)", r"stem.\1."),
    (r"downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"(stages\.\d+)\.(?:downsample_layers|downsampling_layer)\.", r"\1.downsample."),
    (r"(stages\.\d+\.blocks\.\d+)\.(?:dwconv|depthwise_conv)\.", r"\1.conv_dw."),
    (r"(stages\.\d+\.blocks\.\d+)\.(?:pwconv|pointwise_conv)([12])\.", r"\1.mlp.fc\2."),
    (r"(stages\.\d+\.blocks\.\d+)\.(?:layernorm|layer_norm)\.", r"\1.norm."),
    (r"(stages\.\d+\.blocks\.\d+)\.layer_scale_parameter", r"\1.gamma"),
    (r"(?:layernorm|layer_norm|norm)\.", "head.norm."),
    (r"(?:classifier|head)\.(weight|bias)", r"head.fc.\1"),
)
# Norms of the features between, and other heads.
UNUSED = re.compile(r"norms\..*|projectors\..*|head\.pre_logits\..*")


def numbered(params: Any) -> dict:
    """A flat dict with numbered blocks: `stage_0/encoderblock/x` is `stage_0/block_0/x`, ..."""
    out = {}
    for key, value in flatten_dict(params, sep="/").items():
        for i, part in enumerate(value) if "/encoderblock/" in key else ():
            out[key.replace("encoderblock", f"block_{i}")] = part
        if "/encoderblock/" not in key:
            out[key] = value
    return out


def stacked(flat: dict) -> dict:
    """A flat dict with the blocks on top of each other: what `numbered` undoes."""

    def place(key: str) -> tuple | None:
        found = re.match(r"(stage_\d+)/block_(\d+)/", key)
        return found and (key.replace(found[0], f"{found[1]}/encoderblock/"), int(found[2]))

    return vit_layouts.gathered(flat, place)


def from_torch(flat: dict, model: Any, path: Any) -> tuple:
    """The arrays of a state dict by our names, and the names of arrays outside of the model.

    Raises UserError if there is no ConvNeXt, or one of the second version.
    """
    stem = (
        r"(.*?)(?:stem\.0|downsample_layers\.0\.0|embeddings\.patch_embeddings"
        r"|stages\.0\.downsample_layers\.0)\.weight"
    )
    del model  # all have the same names
    flat = {key.removeprefix("convnext."): x for key, x in flat.items()}  # its head is beside that
    flat, outside = state_dicts.one_model(flat, stem, path)
    if found := [key for key in flat if re.search(r"\.grn\.", key)]:
        raise UserError(f"{path} is of ConvNeXt V2 ({found[0]}), which is not computed here: take V1")
    named = {_timm_name(key): value for key, value in flat.items()}
    if not {"stem.0.weight", "stem.1.weight"} <= named.keys():
        raise UserError(f"{path} holds no ConvNeXt (no stem): check config.model.variant")
    out, gammas = {}, {}
    for key, value in named.items():
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            block = f"stage_{match[1]}/block_{match[2]}"
            if match[3] == "gamma":
                gammas[f"{block}/{_MLP}/Dense_1"] = value
                continue
            if match[3].startswith("mlp.") and value.ndim == 4:  # as convolutions of 1 x 1
                value = value[..., 0, 0]
            out |= {f"{block}/{k}": x for k, x in vit_layouts.timm_layer(match[3], value, _BLOCK)}
        elif match := re.fullmatch(r"stages\.(\d+)\.downsample\.(.+)", key):
            known = {"0": f"stage_{match[1]}/merge/norm", "1": f"stage_{match[1]}/merge/reduction"}
            for name, array in vit_layouts.timm_layer(match[2], value, known):
                joined = name.endswith("reduction/kernel")  # [2, 2, C, D], as a Dense of neighbours
                out[name] = array.reshape(-1, array.shape[-1]) if joined else array
        else:
            out |= dict(vit_layouts.timm_layer(key, value, _REST))
    return vit_layouts.scaled(out, gammas, path), outside


def _timm_name(name: str) -> str:
    """timm's name of an array of another layout; its own stay."""
    if name.startswith(("stem.", "head.norm.", "head.fc.")):
        return name
    for pattern, theirs in _OTHERS:
        name = re.sub(rf"^{pattern}", theirs, name)
    return name


def to_timm(params: Any) -> dict:
    """A tree as the state dict of timm's `ConvNeXt`, LayerScale folded."""
    flat, out = numbered(params), {}
    for theirs, ours in _REST.items():
        out |= to_timm_layer(flat, ours, theirs)
    for key, value in flat.items():
        if match := re.fullmatch(r"stage_(\d+)/block_(\d+)/dwconv/kernel", key):
            block = f"stages.{match[1]}.blocks.{match[2]}"
            for theirs, ours in _BLOCK.items():
                name = f"stage_{match[1]}/block_{match[2]}/{ours}"
                out |= to_timm_layer(flat, name, f"{block}.{theirs}")
            out[f"{block}.gamma"] = np.ones(value.shape[-1])
        elif match := re.fullmatch(r"stage_(\d+)/merge/reduction/kernel", key):
            theirs, merge = f"stages.{match[1]}.downsample", f"stage_{match[1]}/merge"
            out |= to_timm_layer(flat, f"{merge}/norm", f"{theirs}.0")
            kernel = np.asarray(value).reshape(2, 2, -1, value.shape[-1]).transpose(3, 2, 0, 1)
            out |= {f"{theirs}.1.weight": kernel, f"{theirs}.1.bias": flat[f"{merge}/reduction/bias"]}
    return {key: np.ascontiguousarray(value, np.float32) for key, value in out.items()}
