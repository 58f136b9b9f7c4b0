"""Public layouts of ResNet weights, to and from our tree.

Read are torchvision's and timm's `resnet50` (the same names), timm's `resnetv2_50x1_bit`, the public
`BiT-M-R50x1.npz` and big_vision's names of it. Our names are those of models/resnet.py.
"""

import re
from typing import Any

import numpy as np

from rlrr_jax.errors import UserError
from rlrr_jax.weights import state_dicts
from rlrr_jax.weights.plain_layouts import numbered, stacked

__all__ = ["STEM", "UNUSED", "numbered", "stacked"]  # what `reader` asks a module of layouts for

STEM = None  # pixels cannot be folded: it is padded
_EPS = 1e-5  # of torchvision's BatchNorm
# Counters, and what training put behind the network.
UNUSED = re.compile(
    r".*num_batches_tracked|(fc|head|projection_head|projector|predictor|prototypes|queue|queue_ptr)\b.*"
)


def from_torch(flat: dict, model: Any, path: Any) -> tuple:
    """The arrays of a state dict by our names, and the names of arrays outside of it.

    BatchNorm's statistics are folded into its scale and bias, whose tree has no others.

    Raises UserError if it is no ResNet of that kind.
    """
    bit = model.bit
    stem = "stem.conv.weight" if bit else "conv1.weight"
    inner = r"((?:(?!layer\d|stages|downsample)\w+\.)*)" + re.escape(stem)
    flat, outside = state_dicts.one_model(flat, inner, path)
    if stem not in flat:
        raise UserError(f"{path} has no array '{stem}': it is no such ResNet; check config.model")
    out: dict = {}
    for key, value in flat.items():
        name = (_from_timm_bit if bit else _from_torchvision)(key)
        name = key if name is None else name
        if value.ndim == 4 and name == "head/kernel":  # a convolution of 1 x 1
            value = value[:, :, 0, 0]
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
        out[name] = value.transpose(axes) if axes and name.endswith("/kernel") else value
    norms = [key.removesuffix("/scale") for key in out if key.endswith("/scale") and not bit]
    if plain := [name for name in norms if f"{name}/var" not in out]:
        raise UserError(f"{path}: {plain[0]} is no BatchNorm (no running_var): it is another ResNet")
    for name in [key.removesuffix("/var") for key in out if key.endswith("/var")]:
        mean, var = out.pop(f"{name}/mean", None), out.pop(f"{name}/var")
        parts = [out.get(f"{name}/scale"), out.get(f"{name}/bias"), mean, var]
        if any(x is None or x.shape != var.shape for x in parts):
            raise UserError(f"{path}: the BatchNorm {name} is not whole: download the file again")
        scale = parts[0].astype(np.float64) / np.sqrt(var.astype(np.float64) + _EPS)
        out[f"{name}/bias"] = (parts[1] - mean * scale).astype(np.float32)
        out[f"{name}/scale"] = scale.astype(np.float32)
    return out, outside


def _from_torchvision(key):
    """Our name of one of torchvision's, or None."""
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    stem, _, part = key.rpartition(".")
    unit = re.fullmatch(r"layer(\d+)\.(\d+)\.(.+)", stem)
    inner = unit[3] if unit else stem
    prefix = f"stage_{int(unit[1]) - 1}_unit_{unit[2]}/" if unit else ""
    if stem == "fc":
        return f"head/{'kernel' if part == 'weight' else part}"
    if match := re.fullmatch(r"(?:conv(\d)|downsample\.0)", inner):
        name = f"conv{match[1]}" if match[1] else "conv_proj"
        return (prefix + name if unit else "conv_root") + "/kernel" if part == "weight" else None
    if (match := re.fullmatch(r"(?:bn(\d)|downsample\.1)", inner)) and part in leaves:
        name = f"bn{match[1]}" if match[1] else "bn_proj"
        return (prefix + name if unit else "bn_root") + f"/{leaves[part]}"
    return None


def _from_timm_bit(key):
    """Our name of one of timm's ResNetV2, or None."""
    stem, _, part = key.rpartition(".")
    kernel, leaf = "kernel" if part == "weight" else part, {"weight": "scale"}.get(part, part)
    if stem in ("stem.conv", "norm", "head.fc"):
        names = {"stem.conv": "conv_root", "norm": "gn_head", "head.fc": "head"}
        return f"{names[stem]}/{leaf if stem == 'norm' else kernel}"
    if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(conv|norm|downsample\.conv)(\d?)", stem):
        unit = f"stage_{match[1]}_unit_{match[2]}"
        if match[3] == "norm":
            return f"{unit}/gn{match[4]}/{leaf}"
        return f"{unit}/conv{match[4] or '_proj'}/{kernel}"
    return None


def from_jax(flat: dict, path: Any) -> tuple:
    """The arrays of an `.npz` of BiT by our names, and the names of arrays outside of it.

    Raises UserError if there is none.
    """
    out = {}
    for key, value in flat.items():
        name = _from_bit(re.sub(r"^(params/|resnet/)", "", key))
        if name is not None and (name.startswith(("gn", "head")) or "/gn" in name):
            value = value.reshape(value.shape[-2:] if name == "head/kernel" else -1)
        out[name or key] = value
    if "conv_root/kernel" not in out:
        raise UserError(f"{path} holds no ResNet of BiT (no root_block): check config.model")
    return out, []


def _from_bit(key):
    """Our name of one of BiT's or big_vision's, or None."""
    key = re.sub(r"standardized_conv2d(_\d+)?/", "", key)
    leaf = key.rpartition("/")[2]
    leaf = {"gamma": "scale", "beta": "bias"}.get(leaf, leaf)
    if re.fullmatch(r"root_block/(conv_root/)?kernel", key):
        return "conv_root/kernel"
    if re.fullmatch(r"(group_norm|norm-pre-head)/\w+", key):
        return f"gn_head/{leaf}"
    if re.fullmatch(r"head/(conv2d/)?\w+", key):
        return f"head/{leaf}"
    match = re.fullmatch(r"block(\d)/unit(\d+)/(.+)/\w+", key)
    if match is None:
        return None
    unit, inner = f"stage_{int(match[1]) - 1}_unit_{int(match[2]) - 1}", match[3]
    if inner in ("a/proj", "conv_proj"):
        return f"{unit}/conv_proj/{leaf}"
    if found := re.fullmatch(r"([abc])(/group_norm)?", inner):
        return f"{unit}/{'gn' if found[2] else 'conv'}{'abc'.index(found[1]) + 1}/{leaf}"
    return f"{unit}/{inner}/{leaf}" if re.fullmatch(r"(conv|gn)\d", inner) else None


def to_timm(params: Any) -> dict:
    """A tree as the state dict of timm's ResNet (and torchvision's), or of its ResNetV2 for BiT's.

    BatchNorm has a mean of 0 and a variance that its epsilon makes 1: they are in scale and bias.
    """
    flat = numbered(params)
    bit = "gn_head/scale" in flat
    out: dict = {}
    for key, value in flat.items():
        value = np.asarray(value, np.float32)
        stem, _, part = key.rpartition("/")
        theirs = (_to_timm_bit if bit else _to_torchvision)(stem)
        part = "weight" if part in ("kernel", "scale") else part
        if bit and stem == "head" and part == "weight":
            value = value[None, None]
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)
        out[f"{theirs}.{part}"] = np.ascontiguousarray(value.transpose(axes) if axes else value)
        if not bit and key.endswith("/scale"):
            out[f"{theirs}.running_mean"] = np.zeros_like(value)
            out[f"{theirs}.running_var"] = np.full_like(value, 1 - _EPS)
            out[f"{theirs}.num_batches_tracked"] = np.zeros((), np.int64)
    return out


def _to_torchvision(stem):
    names = {"conv_root": "conv1", "bn_root": "bn1", "head": "fc"}
    if stem in names:
        return names[stem]
    stage, unit, inner = re.fullmatch(r"stage_(\d)_unit_(\d+)/(\w+)", stem).groups()
    inner = {"conv_proj": "downsample.0", "bn_proj": "downsample.1"}.get(inner, inner)
    return f"layer{int(stage) + 1}.{unit}.{inner}"


def _to_timm_bit(stem):
    names = {"conv_root": "stem.conv", "gn_head": "norm", "head": "head.fc"}
    if stem in names:
        return names[stem]
    stage, unit, inner = re.fullmatch(r"stage_(\d)_unit_(\d+)/(\w+)", stem).groups()
    inner = inner.replace("gn", "norm").replace("conv_proj", "downsample.conv")
    return f"stages.{stage}.blocks.{unit}.{inner}"
