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
    if to == "timm" and models.family(card["model"]) == "resnet":
        return _resnet_advice(card, sizes, out)
    if to == "timm" and models.family(card["model"]) in ("swinv2", "convnext"):
        (name,) = [x.name for x in architectures.TIMM.values() if x.variant == card["model"]]
        size = f", img_size={card['image_size']}" if models.family(card["model"]) == "swinv2" else ""
        return (
            f'timm, with pixels in [-1, 1] (mean = std = 0.5): model = timm.create_model("{name}"'
            f"{size}, num_classes={classes}); "
            f'model.load_state_dict(safetensors.torch.load_file("{out}"))'
        )
    if to == "timm" and models.family(card["model"]) == "swin":
        return (
            f"timm, with pixels in [-1, 1] (mean = std = 0.5): model = timm.models.swin_transformer."
            f"SwinTransformer(img_size={card['image_size']}, num_classes={classes}, embed_dim="
            f"{sizes['width']}, depths={sizes['depths']}, num_heads={sizes['num_heads']}, window_size="
            f'{sizes["window"]}); model.load_state_dict(safetensors.torch.load_file("{out}"))'
        )
    if to == "timm" and models.family(card["model"]) == "rope_vit":
        return _rope_advice(card, sizes, out)
    if to == "timm":
        ratio = sizes["mlp_dim"] / sizes["width"]
        act = {"tanh": ', act_layer="gelu_tanh"', "quick": ', act_layer="quick_gelu"'}
        act = act.get(card["gelu"], "")
        plain = "vision_transformer.VisionTransformer"
        kind = "deit.VisionTransformerDistilled" if sizes.get("dist_token") else plain
        act += "".join(f", {k}={v}" for k, v in _timm_arguments(sizes).items())
        act += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps:g})" if eps != 1e-6 else ""
        return (
            f"timm, with pixels in [-1, 1] (mean = std = 0.5): model = timm.models.{kind}("
            f"img_size={cards.image_size(card)}, patch_size={sizes['patch_size']}, "
            f"num_classes={classes}, embed_dim={sizes['width']}, depth={sizes['depth']}, "
            f"num_heads={sizes['num_heads']}, mlp_ratio={ratio:g}{act}); "
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


def _rope_advice(card, sizes, out):
    """How timm loads one of its models with rotary positions."""
    fitting = [name for name, found in architectures.TIMM.items() if found.variant == card["model"]]
    name = ([x for x in fitting if x.endswith("_qkvb") and sizes.get("qkv_bias") != ""] or fitting)[0]
    whole = models.sizes(card["model"])
    more = {"depth": sizes["depth"]} if sizes["depth"] != whole["depth"] else {}
    if (pool := sizes.get("pool", "token")) != "map":
        normed = bool(sizes.get("fc_norm"))
        more |= dict(global_pool=pool, use_fc_norm=normed, use_post_transformer_norm=not normed)
    more = "".join(f", {key}={value!r}" for key, value in more.items())
    return (
        f'timm, with pixels in [-1, 1] (mean = std = 0.5): model = timm.create_model("{name}", '
        f"img_size={cards.image_size(card)}, num_classes={len(card['classes'])}{more}); "
        f'model.load_state_dict(safetensors.torch.load_file("{out}"))'
    )


def _timm_arguments(sizes):
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


def _resnet_advice(card, sizes, out):
    """How a ResNet is used with timm."""
    variant = card["model"]
    name = variant.replace("bit_", "resnetv2_") + "_bit" if variant.startswith("bit") else variant
    pixels = f"mean={sizes.get('mean', (0.5,) * 3)}, std={sizes.get('std', (0.5,) * 3)}"
    return (
        f'timm, with pixels of {pixels}: model = timm.create_model("{name}", num_classes='
        f'{len(card["classes"])}); model.load_state_dict(safetensors.torch.load_file("{out}"))'
    )
