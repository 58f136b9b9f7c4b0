"""A second formulation of the ViT and of RLRR, for comparison: plain numpy-like code, a Python loop
over blocks, convolution for the patches, attention written out, adapters applied where their papers
draw them instead of folded into weights."""

import jax
import jax.numpy as jnp


def layer_norm(x, p):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    """x [B, T, in] @ kernel + bias, heads flattened: [B, T, out]."""
    bias = p["bias"].reshape(-1)
    return jnp.einsum("bti,ij->btj", x, p["kernel"].reshape(-1, bias.size)) + bias


def patches(x, p):
    """Images [B, H, W, 3] to [B, h * w, D], as a convolution."""
    x = jax.lax.conv_general_dilated(
        x, p["kernel"], p["kernel"].shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return x.reshape(len(x), -1, x.shape[-1]) + p["bias"]


def plain(site, block, x, p):
    """What a plain ViT does at a site with the weights `p` there."""
    if "orm" in site:
        return layer_norm(x, p)
    return patches(x, p) if site == "embedding" else dense(x, p)


@jax.numpy_rank_promotion("allow")  # it is written like NumPy
def forward(params, images, num_heads, gelu, around=plain):
    """Logits of a tree.

    Args:
      around: `(site, block, x, p) -> y`, done at "embedding", "LayerNorm_0", "query", "key", "value",
        "out", "LayerNorm_1", "Dense_0", "Dense_1" of each block and "encoder_norm": where an adapter
        does something beside or instead of `plain`. x and y are [B, T, ...], heads flattened.
    """
    x = around("embedding", None, images, params["embedding"]) + params["pos_embedding"]
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (len(x), 1, x.shape[-1])), x], 1)
    blocks = params["Transformer"]["encoderblock"]
    for i in range(blocks["LayerNorm_0"]["scale"].shape[0]):
        b = jax.tree.map(lambda v: v[i], blocks)
        attention, mlp = b["MultiHeadDotProductAttention_0"], b["MlpBlock_0"]
        y = around("LayerNorm_0", i, x, b["LayerNorm_0"])
        split = lambda y: y.reshape(*y.shape[:2], num_heads, -1)
        q, k, v = (split(around(n, i, y, attention[n])) for n in ("query", "key", "value"))
        weights = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), v)
        x = x + around("out", i, y.reshape(x.shape), attention["out"])
        y = around("LayerNorm_1", i, x, b["LayerNorm_1"])
        y = jax.nn.gelu(around("Dense_0", i, y, mlp["Dense_0"]), approximate=gelu == "tanh")
        x = x + around("Dense_1", i, y, mlp["Dense_1"])
    x = around("encoder_norm", None, x, params["Transformer"]["encoder_norm"])
    return x[:, 0] @ params["head"]["kernel"] + params["head"]["bias"]
