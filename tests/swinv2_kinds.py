"""Small Swins V2, and timm's models of the same arguments."""

import jax
import numpy as np
import safetensors.numpy

from rlrr_jax import models
from rlrr_jax.models import swinv2
from rlrr_jax.weights import preprocessing, reader, swinv2_layouts

HOW = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF, resize="bicubic")
# Windows of 4 tokens; the same, pretrained with 3; windows that are as large as the last grid.
WINDOWS = {"plain": (4, 0, 32), "pretrained": (4, 3, 32), "whole": (8, 0, 32)}


def model(kind, **other):
    """Ours."""
    window, before, _ = WINDOWS[kind]
    sizes = dict(width=8, depths=(2, 4), num_heads=(1, 2), patch_size=2, window=window)
    return swinv2.SwinV2(**{**sizes, "pretrained_window": before, "num_classes": 3, **other})


def timms(kind):
    """timm's, untrained."""
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    window, before, size = WINDOWS[kind]
    return SwinTransformerV2(
        img_size=size, patch_size=2, num_classes=3, embed_dim=8, depths=(2, 4), num_heads=(1, 2),
        window_size=window, pretrained_window_sizes=(before, before),
    ).eval()  # fmt: skip


def state(kind):
    """Random arrays by timm's names, from the shapes of our tree."""
    shapes = models.shapes(model(kind), WINDOWS[kind][2])
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    random, out = np.random.default_rng(0), {}
    for name, x in sorted(swinv2_layouts.to_timm(zeros).items()):
        near = 1.0 if (name.endswith("weight") and x.ndim == 1) or "logit_scale" in name else 0.0
        out[name] = (near + random.normal(0, 0.3, x.shape)).astype(np.float32)
    return out


def images(kind):
    """Two, in [-1, 1]."""
    size = WINDOWS[kind][2]
    return np.random.default_rng(1).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def tree(kind, folder, arrays=None):
    """Our tree, read from a file."""
    path = folder / "x.safetensors"
    arrays = state(kind) if arrays is None else arrays
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, path)
    size = WINDOWS[kind][2]
    return reader.load(path, model=model(kind), image_size=size, how=HOW, head=True)


def logits(kind, params, **other):
    """What our model makes of `images`."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(model(kind, **other).apply)({"params": params}, images(kind)))
