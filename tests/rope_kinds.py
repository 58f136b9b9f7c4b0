"""Small ViTs with rotary positions, one of each kind, and timm's models of the same arguments."""

import functools

import jax
import numpy as np
import safetensors.numpy

from rlrr_jax import models
from rlrr_jax.models import rope_vit
from rlrr_jax.weights import preprocessing, reader, rope_layouts

HOW = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF, resize="bicubic")

_PE, _EVA = rope_vit.VARIANTS["pe_core_b16"], rope_vit.VARIANTS["eva02_b14"]
_SAME = dict(width=24, depth=2, mlp_dim=48, num_heads=2, patch_size=4)


def _like(variant, **other):
    return {**variant, **_SAME, **other}


ATTRIBUTES = {
    "dinov3": dict(_SAME),
    "dinov3, gated": dict(_SAME, gated=True),
    "pe_core": _like(_PE, rotary=_PE["rotary"]._replace(reference=5), pool_heads=4),
    "pe_core, no class token": _like(_PE, class_token=False, pool_heads=4),
    "eva02": _like(_EVA, mlp_norm=False, mlp_dim=40),
    "eva02, norm": _like(_EVA, mlp_dim=40),
}
# Arguments of timm's Eva beside sizes, as its functions of these models have them.
_DINO = dict(
    qkv_bias=True, init_values=1e-5, rope_type="dinov3", rope_temperature=100, rope_rotate_half=True,
    use_rot_pos_emb=True, use_abs_pos_emb=False, num_reg_tokens=4, use_fc_norm=False,
    global_pool="token",
)  # fmt: skip
_CORE = dict(
    global_pool="map", attn_type="rope", use_pre_transformer_norm=True, use_rot_pos_emb=True,
    rope_grid_indexing="xy", attn_pool_num_heads=4, attn_pool_mlp_ratio=4.0,
)  # fmt: skip
_EVA02 = dict(swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(16, 16), mlp_ratio=40 / 24)
TIMM = {
    "dinov3": _DINO,
    "dinov3, gated": dict(_DINO, swiglu_mlp=True, swiglu_align_to=8),
    "pe_core": dict(_CORE, ref_feat_shape=(5, 5), rope_grid_offset=1.0),
    "pe_core, no class token": dict(
        _CORE, ref_feat_shape=(14, 14), rope_grid_offset=1.0, class_token=False
    ),
    "eva02": _EVA02,
    "eva02, norm": dict(_EVA02, qkv_fused=False, scale_mlp=True),
}


def model(kind, **other):
    """Ours."""
    return rope_vit.RopeViT(**{**ATTRIBUTES[kind], "num_classes": 3, **other})


def timms(kind, size):
    """timm's for images of a size, untrained."""
    import timm.layers
    from timm.models.eva import Eva

    eps = 1e-6 if kind.startswith("eva02") else 1e-5
    sizes = dict(img_size=size, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    arguments = {"mlp_ratio": 2.0, **sizes, **TIMM[kind], "dynamic_img_size": True}
    return Eva(**arguments, norm_layer=functools.partial(timm.layers.LayerNorm, eps=eps)).eval()


def state(kind, size):
    """Random arrays of a kind by timm's names, for images of a size."""
    shapes = models.shapes(model(kind), size)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    random, out = np.random.default_rng(0), {}
    for name, x in sorted(rope_layouts.to_timm(zeros).items()):
        near = 1.0 if name.endswith("weight") and x.ndim == 1 else 0.0
        out[name] = (near + random.normal(0, 0.3, x.shape)).astype(np.float32)
    return out


def logits_of_a_file(kind, size, images, folder):
    """What our model makes of images, its weights read from a file with the names of `state`."""
    path = folder / "x.safetensors"
    safetensors.numpy.save_file(state(kind, size), path)
    how = HOW._replace(grid=(size[0] // 4, size[1] // 4))
    tree = reader.load(path, model=model(kind), image_size=size, how=how, head=True)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(model(kind).apply)({"params": tree}, images))
