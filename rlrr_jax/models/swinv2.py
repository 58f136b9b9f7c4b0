"""Swin Transformer V2 (Liu et al., CVPR 2022): norms after branches, cosines, computed positions.

Windows, stages and stacks are those of `swin`. Query, key and value are Dense layers of their own, as
the key has no bias.
"""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax.models import matmul, swin
from rlrr_jax.models.blocks import added
from rlrr_jax.models.matmul import Dense, DenseGeneral

EXAMPLES = ("swinv2_t", "swinv2_s_16", "swinv2_b_12", "swinv2_b_12to16", "swinv2_l_12to24")
_NAME = re.compile(rf"swinv2_([{''.join(swin.VARIANTS)}])(?:_(?:(\d+)to)?(\d+))?")
check_size = swin.check_size


def parse_variant(variant: str) -> dict[str, Any] | None:
    """`"swinv2_b"` -> `dict(width=128, ..., window=8)`; `"swinv2_b_12to16"` was pretrained with 12.

    Returns None for another name.
    """
    match = _NAME.fullmatch(str(variant))
    if match is None or {"0", "1"} & {match[2], match[3]}:
        return None
    sizes = dict(swin.VARIANTS[match[1]], patch_size=4, window=int(match[3] or 8))
    return sizes | ({"pretrained_window": int(match[2])} if match[2] else {})


def default_size(variant: str) -> int:
    """The side of images of public weights: 256 pixels with windows of 8 or 16 tokens, 192 with 12."""
    window = (parse_variant(variant) or {"window": 8})["window"]
    return 32 * window if window == 8 else 16 * window


def coordinates(window: int, pretrained: int) -> np.ndarray:
    """Distances (rows, columns) of tokens in a window, [(2 window - 1)^2, 2], on a logarithmic scale.

    Args:
      window: tokens along its side.
      pretrained: that of the windows of pretraining, or 0.
    """
    distance = np.arange(1 - window, window) * 8.0 / max((pretrained or window) - 1, 1)
    scaled = np.sign(distance) * np.log2(np.abs(distance) + 1) / 3
    return np.stack(np.meshgrid(scaled, scaled, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


class CosineAttention(nn.Module):
    """Self-attention within windows by cosines of queries and keys, with computed biases."""

    num_heads: int
    window: int
    pretrained_window: int
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        width, high = x.shape[-1], jnp.promote_types(self.dtype, jnp.float32)
        start = nn.initializers.constant(np.log(10.0))
        scale = jnp.exp(jnp.minimum(self.param("logit_scale", start, (self.num_heads,)), np.log(100.0)))
        shape = (self.num_heads, width // self.num_heads)
        heads = functools.partial(DenseGeneral, shape, dtype=self.dtype)
        query, key = heads(name="query")(x), heads(use_bias=False, name="key")(x)
        unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
        # Attention divides by the root of a head's width.
        factor = (scale * shape[1] ** 0.5).reshape(*(1,) * (query.ndim - 2), -1, 1)
        query = (unit(query.astype(high)) * factor).astype(self.dtype)
        key = unit(key.astype(high)).astype(self.dtype)
        bias = self._bias()[None]  # [1, heads, N, N]
        if mask is not None:
            bias = bias + mask[:, None]
        keep = jax.checkpoint_policies.dots_saveable
        values = heads(name="value")(x)
        x = jax.checkpoint(matmul.attention, policy=keep)(query, key, values, bias[None])
        return Dense(width, dtype=self.dtype, name="out")(x.reshape(*x.shape[:-2], width))

    def _bias(self):
        """The bias of each pair of tokens, [heads, N, N], from an MLP of their distance."""
        places = coordinates(self.window, self.pretrained_window)
        table = nn.relu(nn.Dense(512, name="cpb_0")(places))
        table = 16 * nn.sigmoid(nn.Dense(self.num_heads, use_bias=False, name="cpb_1")(table))
        return table[swin.relative_index(self.window)].transpose(2, 0, 1)


class Block(swin.Block):
    """One block; norms come after attention and MLP."""

    pretrained_window: int = 0

    def attention(self):
        """What attends within windows."""
        kind = self.num_heads, self.window, self.pretrained_window, self.dtype
        return CosineAttention(*kind, name=swin.ATTENTION)

    @nn.compact
    def __call__(self, x, rate, keep):
        first, second = (None, None) if keep is None else keep
        norm = functools.partial(matmul.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        x = added(x, norm(name="LayerNorm_0")(self.attended(x)), rate, first)
        return added(x, norm(name="LayerNorm_1")(self.mlp(x)), rate, second)


class PatchMerging(swin.PatchMerging):
    """Dense of four neighbours, then LayerNorm: half the grid, twice the width."""

    @nn.compact
    def __call__(self, x):
        x, width = swin.merged_patches(x), 2 * x.shape[-1]
        x = Dense(width, use_bias=False, dtype=self.dtype, name="reduction")(x)
        return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)


class SwinV2(swin.Swin):
    """Swin Transformer V2 with a zero-initialised float32 head on the mean of its last tokens.

    Attributes:
      pretrained_window: tokens along a side of pretraining's windows, where they were others, or 0.
      The others are as those of `swin.Swin`.
    """

    pretrained_window: int = 0

    def kinds(self):
        """Classes of blocks and of what merges patches."""
        return Block, PatchMerging

    def block_options(self, stage):
        """Attributes of the blocks of a stage: no window was larger than the grid of pretraining."""
        grid = 4 * self.pretrained_window >> stage
        return {"pretrained_window": min(self.pretrained_window, grid)}


Model = SwinV2
