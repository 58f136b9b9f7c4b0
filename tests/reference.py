"""A second formulation of the ViT and of RLRR, for comparison: plain numpy-like code, a Python loop
over blocks, convolution for the patches, attention written out, adapters applied where the paper
draws them instead of folded into weights."""

import jax
import jax.numpy as jnp


def layer_norm(x, p):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-6) * p["scale"] + p["bias"]


def dense(x, p, a=None):
    """x @ kernel + bias; with an adapter `a`, the kernel's entries are rescaled one by one."""
    out = p["bias"].shape
    kernel = p["kernel"].reshape(-1, p["bias"].size)
    if a is not None:
        left, right = a["scale_in"].reshape(-1), a["scale_out"].reshape(-1)
        kernel = kernel * (1 + jnp.outer(left, right))
    x = jnp.einsum("bti,ij->btj", x.reshape(*x.shape[:2], -1), kernel)
    x = x.reshape(*x.shape[:2], *out) + p["bias"]
    return x if a is None else x + a["shift"]


def affine(x, a):
    return x if a is None else x * a["scale"] + a["shift"]


def forward(params, images, patch_size, gelu, adapter=None):
    """Logits of a plain tree, or of a frozen tree with an RLRR adapter beside it."""
    sub = lambda tree, *path: None if tree is None else sub(tree[path[0]], *path[1:]) if path else tree
    p = params["embedding"]
    x = jax.lax.conv_general_dilated(
        images, p["kernel"], (patch_size,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = affine(x.reshape(len(images), -1, x.shape[-1]) + p["bias"], sub(adapter, "embedding"))
    x = x + params["pos_embedding"]
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (len(x), 1, x.shape[-1])), x], 1)
    blocks = params["Transformer"]["encoderblock"]
    extra = sub(adapter, "Transformer", "encoderblock")
    depth = blocks["LayerNorm_0"]["scale"].shape[0]
    for i in range(depth):
        b = jax.tree.map(lambda v: v[i], blocks)
        a = jax.tree.map(lambda v: v[i], extra)
        attn, attn_a = b["MultiHeadDotProductAttention_0"], sub(a, "MultiHeadDotProductAttention_0")
        y = affine(layer_norm(x, b["LayerNorm_0"]), sub(a, "LayerNorm_0"))
        q, k, v = (dense(y, attn[n], sub(attn_a, n)) for n in ("query", "key", "value"))
        weights = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), v)
        x = x + dense(y, attn["out"], sub(attn_a, "out"))
        y = affine(layer_norm(x, b["LayerNorm_1"]), sub(a, "LayerNorm_1"))
        y = dense(y, b["MlpBlock_0"]["Dense_0"], sub(a, "MlpBlock_0", "Dense_0"))
        y = jax.nn.gelu(y, approximate=gelu == "tanh")
        x = x + dense(y, b["MlpBlock_0"]["Dense_1"], sub(a, "MlpBlock_0", "Dense_1"))
    x = affine(
        layer_norm(x, params["Transformer"]["encoder_norm"]),
        sub(adapter, "Transformer", "encoder_norm"),
    )
    head = params["head"] if adapter is None else adapter["head"]
    return x[:, 0] @ head["kernel"] + head["bias"]
