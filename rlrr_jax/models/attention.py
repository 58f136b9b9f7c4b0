"""Multi-head attention of a ViT: by XLA, or by cuDNN."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlrr_jax.models import matmul
from rlrr_jax.models.matmul import DenseGeneral


class MultiHeadDotProductAttention(nn.Module):
    """Self-attention, or from `x` to a `context`.

    Attributes:
      implementation: "xla", or "cudnn" where as many tokens are asked as attended to.
      qk_norm: whether queries and keys pass a LayerNorm of this epsilon; None: no.
      qkv_bias: which of query, key and value have one, by their first letters.
      rotate: function of queries and of keys [B, T, H, Dh] that follows; None: none.
    """

    num_heads: int
    implementation: str
    dtype: Any
    qk_norm: float | None = None
    qkv_bias: str = "qkv"
    rotate: Callable | None = None

    @nn.compact
    def __call__(self, x, context=None):
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        context = x if context is None else context
        number, fused = x.shape[1], self.implementation == "cudnn" and x.shape == context.shape
        if fused and number % 2:  # cuDNN takes even numbers in training: one more, which is masked
            x, context = (jnp.pad(y, ((0, 0), (0, 1), (0, 0))) for y in (x, context))
        query, key, value = (
            DenseGeneral(heads, use_bias=name[0] in self.qkv_bias, dtype=self.dtype, name=name)(y)
            for name, y in (("query", x), ("key", context), ("value", context))
        )
        if self.qk_norm is not None:
            norm = dict(epsilon=self.qk_norm, dtype=self.dtype)
            query = nn.LayerNorm(**norm, name="query_norm")(query)
            key = nn.LayerNorm(**norm, name="key_norm")(key)
        if self.rotate is not None:
            query, key = self.rotate(query), self.rotate(key)  # [B, T, H, Dh]
        if fused:
            x = matmul.fused_attention(query, key, value, number)
        else:  # keep what the matmuls give, not the steps of the softmax
            keep = jax.checkpoint_policies.dots_saveable
            x = jax.checkpoint(matmul.attention, policy=keep)(query, key, value)
        x = DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(x)
        return x[:, :number] if fused else x
