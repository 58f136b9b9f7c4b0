"""How an exported file is used elsewhere: the lines that `export` prints."""

from typing import Any

from rlrr_jax import cards, files, graphs, models, run_model
from rlrr_jax.results import model_card
from rlrr_jax.weights import architectures


def advice(to: str, adapter: Any, out: Any) -> str:
    """How the file is used elsewhere."""
    if to in graphs.FORMATS:
        return graphs.advice(to, adapter, out)
    card, classes = adapter.card, len(adapter.card["classes"])
    sizes = {**models.sizes(card["model"]), **run_model.architecture(adapter.run)}
    eps = sizes.pop("norm_eps", 1e-6)
    if to == "timm":
        pixels, model = _timm(card, sizes, eps)
        return (
            f"timm, with pixels {pixels}: model = {model}; "
            f'model.load_state_dict(safetensors.torch.load_file("{out}"))'
        )
    if to in ("adapter", "hub"):
        local = to == "hub" and not str(out).startswith("hf:")
        file = files.local(out) / model_card.FILE if local else out
        return f"python -m rlrr_jax.predict --adapter {file} IMAGES..."
    if to == "transformers":
        return f'transformers: AutoModelForImageClassification.from_pretrained("{out}")'
    pool = ', pool_type="tok"' if to == "big_vision" else ""
    sizes = ", ".join(f"{name}={value}" for name, value in sizes.items())
    text = f"{to}, with pixels in [-1, 1]: ViT of num_classes={classes}, {sizes}{pool}"
    if card["gelu"] != "tanh":  # which their code has
        other = {"exact": "nn.gelu(x, approximate=False)", "quick": "x * nn.sigmoid(1.702 * x)"}
        text += f"; this model has the {card['gelu']} GELU: "
        text += f"change nn.gelu(x) there to {other[card['gelu']]}"
    if eps != 1e-6:
        text += f"; its LayerNorms have epsilon={eps:g}: change nn.LayerNorm() there"
    return text


def _timm(card, sizes, eps):
    """The pixels that timm's model takes, and the call that builds it."""
    family, number = models.family(card["model"]), f"num_classes={len(card['classes'])}"
    pixels, side = "in [-1, 1] (mean = std = 0.5)", f"img_size={cards.image_size(card)}"
    if family == "resnet":
        name = card["model"]
        name = name.replace("bit_", "resnetv2_") + "_bit" if name.startswith("bit") else name
        pixels = f"of mean={sizes.get('mean', (0.5,) * 3)}, std={sizes.get('std', (0.5,) * 3)}"
        return pixels, f'timm.create_model("{name}", {number})'
    if family in ("swinv2", "convnext"):
        (name,) = [x.name for x in architectures.TIMM.values() if x.variant == card["model"]]
        size = f"{side}, " * (family == "swinv2")
        return pixels, f'timm.create_model("{name}", {size}{number})'
    if family == "swin":
        ours = ("width", "depths", "num_heads", "window")
        theirs = ("embed_dim", "depths", "num_heads", "window_size")
        more = "".join(f", {key}={sizes[name]}" for key, name in zip(theirs, ours))
        return pixels, f"timm.models.swin_transformer.SwinTransformer({side}, {number}{more})"
    if family == "rope_vit":
        name, more = _rope_arguments(card, sizes)
        return pixels, f'timm.create_model("{name}", {side}, {number}{more})'
    act = {"tanh": ', act_layer="gelu_tanh"', "quick": ', act_layer="quick_gelu"'}
    more = act.get(card["gelu"], "") + "".join(f", {k}={v}" for k, v in _vit_arguments(sizes).items())
    more += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps:g})" if eps != 1e-6 else ""
    plain = "vision_transformer.VisionTransformer"
    kind = "deit.VisionTransformerDistilled" if sizes.get("dist_token") else plain
    return pixels, (
        f"timm.models.{kind}({side}, patch_size={sizes['patch_size']}, {number}, "
        f"embed_dim={sizes['width']}, depth={sizes['depth']}, num_heads={sizes['num_heads']}, "
        f"mlp_ratio={sizes['mlp_dim'] / sizes['width']:g}{more})"
    )


def _rope_arguments(card, sizes):
    """timm's name of a model with rotary positions, and its other arguments."""
    fitting = [name for name, found in architectures.TIMM.items() if found.variant == card["model"]]
    name = ([x for x in fitting if x.endswith("_qkvb") and sizes.get("qkv_bias") != ""] or fitting)[0]
    whole = models.sizes(card["model"])
    more = {"depth": sizes["depth"]} if sizes["depth"] != whole["depth"] else {}
    if (pool := sizes.get("pool", "token")) != "map":
        normed = bool(sizes.get("fc_norm"))
        more |= dict(global_pool=pool, use_fc_norm=normed, use_post_transformer_norm=not normed)
    return name, "".join(f", {key}={value!r}" for key, value in more.items())


def _vit_arguments(sizes):
    """Arguments of timm's ViT beside its sizes, of our attributes."""
    out = {}
    pool = sizes.get("pool", "token")
    if pool in ("avg", "map"):
        out |= {"global_pool": repr(pool), "fc_norm": bool(sizes.get("fc_norm"))}
    for ours, theirs in (("class_token",) * 2, ("pre_norm",) * 2, ("qk_norm",) * 2):
        out |= {theirs: sizes[ours]} if ours in sizes else {}
    if sizes.get("registers"):
        out |= {"reg_tokens": sizes["registers"], "no_embed_class": True}
    return out
