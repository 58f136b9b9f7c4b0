"""Independent plain ViTs that know their weights only by big_vision's or timm's names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def norm(x, scale, bias):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-6) * scale + bias


@jax.numpy_rank_promotion("allow")  # it is written like NumPy
@functools.partial(jax.jit, static_argnames="gelu")
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
@functools.partial(jax.jit, static_argnames=("num_heads", "gelu", "pool"))
def timm(weights, images, num_heads, gelu="exact", pool="token"):
    """Logits of timm's `VisionTransformer` by its names, with what the weights have of LayerScale,
    registers, norms before the blocks, of queries and keys or after pooling, a second head.

    Args:
      images: [B, H, W, 3], normalised as the model wants them.
    """
    act = {
        "exact": lambda x: jax.nn.gelu(x, approximate=False),
        "tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "quick": lambda x: x / (1 + jnp.exp(-1.702 * x)),
    }[gelu]
    w = {k: jnp.asarray(v) for k, v in weights.items()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    p = w["patch_embed.proj.weight"].shape[-1]
    b, height, width, _ = images.shape
    x = images.reshape(b, height // p, p, width // p, p, 3)
    x = jnp.einsum("bhiwjc,dcij->bhwd", x, w["patch_embed.proj.weight"])
    x = (x + w.get("patch_embed.proj.bias", 0)).reshape(b, -1, x.shape[-1])
    if "reg_token" in w:  # positions are of patches alone
        x = x + w["pos_embed"]
    tokens = [w[key] for key in ("cls_token", "dist_token", "reg_token") if key in w]
    x = jnp.concatenate([*(jnp.tile(token, (b, 1, 1)) for token in tokens), x], axis=1)
    if "reg_token" not in w:
        x = x + w["pos_embed"]
    affine = lambda x, name: (
        norm(x, w[f"{name}.weight"], w[f"{name}.bias"]) if name + ".bias" in w else x
    )
    x = affine(x, "norm_pre")
    depth = sum(key.endswith(".norm1.weight") for key in w)
    for i in range(depth):
        n = f"blocks.{i}"
        y = linear(norm(x, w[f"{n}.norm1.weight"], w[f"{n}.norm1.bias"]), f"{n}.attn.qkv")
        q, k, v = y.reshape(b, -1, 3, num_heads, x.shape[-1] // num_heads).transpose(2, 0, 3, 1, 4)
        q, k = affine(q, f"{n}.attn.q_norm"), affine(k, f"{n}.attn.k_norm")
        y = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v  # [B, H, T, Dh]
        y = linear(y.swapaxes(1, 2).reshape(x.shape), f"{n}.attn.proj")
        x = x + y * w.get(f"{n}.ls1.gamma", 1)
        y = linear(norm(x, w[f"{n}.norm2.weight"], w[f"{n}.norm2.bias"]), f"{n}.mlp.fc1")
        y = linear(act(y), f"{n}.mlp.fc2")
        x = x + y * w.get(f"{n}.ls2.gamma", 1)
    x = affine(x, "norm")
    if "head_dist.weight" in w:
        return (linear(x[:, 0], "head") + linear(x[:, 1], "head_dist")) / 2
    patches = x[:, sum(token.shape[1] for token in tokens) :]
    if pool == "map":
        q = linear(w["attn_pool.latent"], "attn_pool.q").reshape(1, num_heads, -1)
        k, v = (
            linear(patches, "attn_pool.kv")
            .reshape(b, -1, 2, num_heads, q.shape[-1])
            .transpose(2, 0, 1, 3, 4)
        )
        scores = jax.nn.softmax(jnp.einsum("qhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]))
        y = linear(jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(b, -1), "attn_pool.proj")
        y = y + linear(
            act(linear(affine(y, "attn_pool.norm"), "attn_pool.mlp.fc1")), "attn_pool.mlp.fc2"
        )
    else:
        y = x[:, 0] if pool == "token" else patches.mean(1)
    y = affine(y, "fc_norm")
    return linear(y, "head") if "head.weight" in w else y


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


def kind(rng, name, width=24, classes=5):
    """Random weights of one of the kinds of ViT, by timm's names: `(weights, pool, gelu)`."""
    draw = lambda *shape: (0.2 * rng.standard_normal(shape)).astype(np.float32)
    out, pool, gelu = timm_weights(rng, scale=False), "token", "exact"
    norms = lambda *names: {
        f"{n}.{p}": draw(width) + (p == "weight") for n in names for p in ("weight", "bias")
    }
    dense = lambda name, rows, columns: {
        f"{name}.weight": draw(rows, columns),
        f"{name}.bias": draw(rows),
    }
    if name == "registers":
        out |= {"reg_token": draw(1, 4, width), "pos_embed": draw(1, 9, width)}
    elif name == "distilled":
        out |= {"dist_token": draw(1, 1, width), "pos_embed": draw(1, 11, width)}
        out |= dense("head_dist", classes, width)
    elif name == "clip":
        out |= norms("norm_pre")
        del out["patch_embed.proj.bias"]
        gelu = "quick"
    elif name == "qk_norm":
        for i in range(3):
            for n in ("q_norm", "k_norm"):
                out[f"blocks.{i}.attn.{n}.weight"] = 1 + draw(8)
                out[f"blocks.{i}.attn.{n}.bias"] = draw(8)
    elif name == "fc_norm":
        out |= norms("fc_norm")
        del out["norm.weight"], out["norm.bias"]
        pool = "avg"
    else:  # no class token: the mean, or attention pooling
        del out["cls_token"]
        out["pos_embed"] = draw(1, 9, width)
        pool = name
    if name == "map":
        out |= {"attn_pool.latent": draw(1, 1, width)} | norms("attn_pool.norm")
        rows = {"q": width, "kv": 2 * width, "proj": width, "mlp.fc1": 48, "mlp.fc2": width}
        for layer, number in rows.items():
            out |= dense(f"attn_pool.{layer}", number, 48 if layer == "mlp.fc2" else width)
    return out, pool, gelu
