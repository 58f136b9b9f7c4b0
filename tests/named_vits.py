"""Independent plain ViTs that know their weights only by big_vision's or timm's names."""

import jax
import jax.numpy as jnp
import numpy as np


def norm(x, scale, bias):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-6) * scale + bias


@jax.numpy_rank_promotion("allow")  # it is written like NumPy
def big_vision(weights, images, gelu="tanh"):
    """Logits of big_vision's `models/vit.py` with `pool_type="tok"`, by its names without `params/`."""
    w = {k.removeprefix("params/"): jnp.asarray(v) for k, v in weights.items()}
    kernel = w["embedding/kernel"]
    x = jax.lax.conv_general_dilated(
        images, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = (x + w["embedding/bias"]).reshape(len(x), -1, x.shape[-1]) + w["pos_embedding"]
    x = jnp.concatenate([jnp.tile(w["cls"], (len(x), 1, 1)), x], axis=1)
    depth = sum("LayerNorm_0/scale" in key for key in w)
    for i in range(depth):
        b = f"Transformer/encoderblock_{i}"
        a = f"{b}/MultiHeadDotProductAttention_0"
        y = norm(x, w[f"{b}/LayerNorm_0/scale"], w[f"{b}/LayerNorm_0/bias"])
        q, k, v = (
            jnp.einsum("btd,dhe->bthe", y, w[f"{a}/{n}/kernel"]) + w[f"{a}/{n}/bias"]
            for n in ("query", "key", "value")
        )
        scores = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1]))
        y = jnp.einsum("bhqk,bkhe->bqhe", scores, v)
        x = x + jnp.einsum("bthe,hed->btd", y, w[f"{a}/out/kernel"]) + w[f"{a}/out/bias"]
        y = norm(x, w[f"{b}/LayerNorm_1/scale"], w[f"{b}/LayerNorm_1/bias"])
        y = y @ w[f"{b}/MlpBlock_0/Dense_0/kernel"] + w[f"{b}/MlpBlock_0/Dense_0/bias"]
        y = jax.nn.gelu(y, approximate=gelu == "tanh")
        x = x + y @ w[f"{b}/MlpBlock_0/Dense_1/kernel"] + w[f"{b}/MlpBlock_0/Dense_1/bias"]
    x = norm(x, w["Transformer/encoder_norm/scale"], w["Transformer/encoder_norm/bias"])
    return x[:, 0] @ w["head/kernel"] + w["head/bias"]


@jax.numpy_rank_promotion("allow")
def timm(weights, images, num_heads, gelu="exact"):
    """Logits of timm's `VisionTransformer` (LayerScale where there is one), by its names.

    Args:
      images: [B, H, W, 3], normalised as the model wants them.
    """
    w = {k: jnp.asarray(v) for k, v in weights.items()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    p = w["patch_embed.proj.weight"].shape[-1]
    b, height, width, _ = images.shape
    x = images.reshape(b, height // p, p, width // p, p, 3)
    x = jnp.einsum("bhiwjc,dcij->bhwd", x, w["patch_embed.proj.weight"]) + w["patch_embed.proj.bias"]
    x = x.reshape(b, -1, x.shape[-1])
    x = jnp.concatenate([jnp.tile(w["cls_token"], (b, 1, 1)), x], axis=1) + w["pos_embed"]
    depth = sum(key.endswith(".norm1.weight") for key in w)
    for i in range(depth):
        n = f"blocks.{i}"
        y = linear(norm(x, w[f"{n}.norm1.weight"], w[f"{n}.norm1.bias"]), f"{n}.attn.qkv")
        q, k, v = y.reshape(b, -1, 3, num_heads, x.shape[-1] // num_heads).transpose(2, 0, 3, 1, 4)
        y = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v  # [B, H, T, Dh]
        y = linear(y.swapaxes(1, 2).reshape(x.shape), f"{n}.attn.proj")
        x = x + y * w.get(f"{n}.ls1.gamma", 1)
        y = linear(norm(x, w[f"{n}.norm2.weight"], w[f"{n}.norm2.bias"]), f"{n}.mlp.fc1")
        y = linear(jax.nn.gelu(y, approximate=gelu == "tanh"), f"{n}.mlp.fc2")
        x = x + y * w.get(f"{n}.ls2.gamma", 1)
    x = norm(x, w["norm.weight"], w["norm.bias"])[:, 0]
    return linear(x, "head") if "head.weight" in w else x


def timm_weights(rng, width=24, depth=3, mlp=48, patch=4, grid=3, classes=5, scale=True):
    """Random weights by timm's names."""
    draw = lambda *shape: (0.2 * rng.standard_normal(shape)).astype(np.float32)
    out = {"cls_token": draw(1, 1, width), "pos_embed": draw(1, 1 + grid**2, width)}
    layers = {"patch_embed.proj": (width, 3, patch, patch), "norm": (width,), "head": (classes, width)}
    for i in range(depth):
        layers |= {f"blocks.{i}.{n}": (width,) for n in ("norm1", "norm2")}
        layers |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width)}
        layers |= {f"blocks.{i}.mlp.fc1": (mlp, width), f"blocks.{i}.mlp.fc2": (width, mlp)}
        out |= {f"blocks.{i}.{n}.gamma": draw(width) for n in ("ls1", "ls2") if scale}
    for name, shape in layers.items():
        out[f"{name}.weight"] = draw(*shape) + (len(shape) == 1)
        out[f"{name}.bias"] = draw(shape[0])
    return out
