"""timm's architectures that our models compute, by their exact names (timm 1.0.31).

Arrays do not show an activation, the place of a norm or the number of heads, and names are close:
`vit_base_patch16_rpn_224` has the arrays of a plain ViT and another computation. So an
architecture is one of these, or refused.
"""

import re
from typing import NamedTuple

from rlrr_jax.errors import UserError, nearest

# Beginning of the name -> (our variant, ends of names that follow it).
_VITS = {
    "vit_tiny_patch16_": ("Ti/16", "224 384"),
    "vit_small_patch8_": ("S/8", "224"),
    "vit_small_patch14_": ("S/14", "dinov2 reg4_dinov2"),
    "vit_small_patch16_": ("S/16", "224 384"),
    "vit_small_patch32_": ("S/32", "224 384"),
    "vit_base_patch8_": ("B/8", "224"),
    "vit_base_patch14_": ("B/14", "dinov2 reg1_tipsv2 reg4_dinov2"),
    "vit_base_patch16_": (
        "B/16",
        "224 224_miil 384 clip_224 clip_384 clip_quickgelu_224 gap_224 reg4_gap_256",
    ),
    "vit_base_patch16_siglip_": ("B/16", "224 256 384 512 gap_224 gap_256 gap_384 gap_512"),
    "vit_base_patch32_": ("B/32", "224 384 clip_224 clip_256 clip_384 clip_448 clip_quickgelu_224"),
    "vit_base_patch32_siglip_": ("B/32", "256 gap_256"),
    "vit_large_patch14_": ("L/14", "224 dinov2 reg1_tipsv2 reg4_dinov2"),
    "vit_large_patch14_clip_": ("L/14", "224 336 quickgelu_224 quickgelu_336"),
    "vit_large_patch16_": ("L/16", "224 384"),
    "vit_large_patch16_siglip_": ("L/16", "256 384 512 gap_256 gap_384 gap_512"),
    "vit_large_patch32_": ("L/32", "224 384"),
    "vit_huge_patch14_": ("H/14", "224 gap_224"),
    "vit_huge_patch14_clip_": ("H/14", "224 336 378 quickgelu_224 quickgelu_378"),
    "vit_huge_patch16_": ("H/16", "gap_448"),
    "eva_large_patch14_": ("L/14", "196 336"),
    "flexivit_": ("", "small base large"),  # of any patch size
    "deit_tiny_patch16_": ("Ti/16", "224"),
    "deit_small_patch16_": ("S/16", "224"),
    "deit_base_patch16_": ("B/16", "224 384"),
    "deit_tiny_distilled_patch16_": ("Ti/16", "224"),
    "deit_small_distilled_patch16_": ("S/16", "224"),
    "deit_base_distilled_patch16_": ("B/16", "224 384"),
    "deit3_small_patch16_": ("S/16", "224 384"),
    "deit3_base_patch16_": ("B/16", "224 384"),
    "deit3_large_patch16_": ("L/16", "224 384"),
    "deit3_huge_patch14_": ("H/14", "224"),
}
_SWINS = {
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "swin_base_patch4_window7_224": "swin_b",
    "swin_large_patch4_window7_224": "swin_l",
    "swin_base_patch4_window12_384": "swin_b_12",
    "swin_large_patch4_window12_384": "swin_l_12",
}
_CONVNEXTS = {f"convnext_{size}": f"convnext_{size[0]}" for size in ("tiny", "small", "base", "large")}
_SWINS |= {
    f"swinv2_{size}_window{name}": f"swinv2_{size[0]}{ours}"
    for name, ours, sizes in (
        *(("8_256", "", "tiny small base"), ("16_256", "_16", "tiny small base")),
        *(("12_192", "_12", "base large"), ("12to16_192to256", "_12to16", "base large")),
        ("12to24_192to384", "_12to24", "base large"),
    )
    for size in sizes.split()
}
_RESNETS = {f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
_RESNETS |= {
    f"resnetv2_{n}_bit": f"bit_{n}" for n in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")
}
# Of rotary positions: DINOv3's and EUPE's, the second with biases of queries and values; others.
_ROPE_VITS = {
    f"vit_{size}_patch16_dinov3{qkvb}": f"dinov3_{variant}"
    for size, variant in (
        *(("tiny", "t16"), ("small", "s16"), ("small_plus", "s16plus"), ("base", "b16")),
        *(("large", "l16"), ("huge_plus", "h16plus"), ("7b", "7b16")),
    )
    for qkvb in ("", "_qkvb")
}
_ROPE_VITS |= {
    f"vit_pe_core_{size}_patch{patch}_{pixels}": f"pe_core_{size[0]}{patch}"
    for size, patch, pixels in (
        *(("tiny", 16, 384), ("small", 16, 384), ("base", 16, 224)),
        *(("large", 14, 336), ("gigantic", 14, 448)),
    )
}
_ROPE_VITS |= {
    f"eva02_{size}_patch14_{pixels}": f"eva02_{size[0]}14"
    for size, large in (("tiny", 336), ("small", 336), ("base", 448), ("large", 448))
    for pixels in (224, large)
}
# SigLIP 2's, which timm has in the same architectures' names.
_TANH = ("vit_base_patch32_siglip_256", "vit_base_patch32_siglip_gap_256")
_TANH += ("vit_large_patch16_siglip_512", "vit_large_patch16_siglip_gap_512")
# Repositories of timm on the Hub whose name is that of the exact GELU, and which have the quick one.
_QUICK = re.compile(
    r"vit_(base_patch32_clip_224\.(laion400m_e32|metaclip_2pt5b|metaclip_400m|openai)"
    r"|base_patch16_clip_224\.(metaclip_2pt5b|metaclip_400m|openai)"
    r"|large_patch14_clip_224\.(dfn2b|metaclip_2pt5b|metaclip_400m|openai)"
    r"|large_patch14_clip_336\.openai|huge_patch14_clip_224\.(dfn5b|metaclip2_worldwide|metaclip_2pt5b)"
    r"|huge_patch14_clip_378\.dfn5b)(?!\w)"
)
# What a refused name has that our models have not.
_WHY = (
    (r"^convnextv2", "global response norms"),
    (r"_pe_|dinov3|_rope|eva02|_mediumd?_patch14_rope", "rotary positions of another kind"),
    (r"_rpn_", "norms after its branches"),
    (r"relpos|_rel|^beit", "relative positions in its attention"),
    (r"resnetblur|resnetaa|resnet\w*(aa|blur)", "filters before its strides"),
    (r"_radio|intern300m", "no last norm"),
    (r"_xp_|parallel|_p[wl]ee|18x2", "parallel branches"),
    (r"^swinv2_cr", "another order of norms and positions"),
    (r"^(se|eca|gc|sk)resne", "attention over channels"),
    (r"resnet\d+[cdst]\b|resnet\d+[cdst]_", "another stem"),
)
# Names that look like timm's.
_LIKE = re.compile(
    r"((\w*vit|deit3?|eva\d*|beit\w*|cait|xcit)_\w*patch\d+\w*|\w*vit_pe_\w+|\w*dinov3\w*|flexivit_\w+"
    r"|convnext\w*|swin\w*_(patch|window)\d\w*|swin(v2|_s3)\w*|(se|eca|gc|sk|wide_|legacy_)*resne[xs]?t\w*)"
)


class Architecture(NamedTuple):
    """What a name of timm's says, and the arrays do not.

    Attributes:
      name: the name.
      variant: our variant; "" for any size.
      gelu: "exact", "tanh" or "quick"; of a ResNet "exact", which it has none of.
      norm_eps: epsilon of LayerNorms.
      num_heads: number of attention heads where it is not the variant's, else None.
    """

    name: str
    variant: str
    gelu: str = "exact"
    norm_eps: float | None = None
    num_heads: int | None = None


def _table() -> dict[str, Architecture]:
    out = {
        name: Architecture(name, variant)
        for name, variant in {**_SWINS, **_RESNETS, **_CONVNEXTS}.items()
    }
    for name, variant in _ROPE_VITS.items():
        out[name] = Architecture(name, variant, "exact", 1e-6 if "eva02" in name else 1e-5)
    for start, (variant, ends) in _VITS.items():
        for name in (start + end for end in ends.split()):
            gelu = "tanh" if name in _TANH else "quick" if "quickgelu" in name else "exact"
            heads = 16 if name == "vit_base_patch16_gap_224" else None
            out[name] = Architecture(name, variant, gelu, 1e-5 if "clip" in name else 1e-6, heads)
    return out


TIMM = _table()


def exact(name: str, where: str) -> Architecture:
    """The architecture of that name; UserError, which says why where that is known, for any other.

    Args:
      name: what a `config.json` says.
      where: the file that it is of, for the message.
    """
    if name in TIMM:
        return TIMM[name]
    has = next((f", which has {what}" for pattern, what in _WHY if re.search(pattern, name)), "")
    near = f" ({nearest(name, TIMM)} are {len(TIMM)} others)" if not has else ""
    raise UserError(f"{where} names {name}{has}: it is not computed here{near}, take another")


def by_name(text: str, where: str) -> Architecture | None:
    """The architecture that the name of a file, folder or repository tells; None if it tells none.

    It may go on after timm's name: `deit_tiny_patch16_224-a1311bcf`, `vit_base_patch16_224.dino`.

    Raises UserError for a name that is like timm's, and none of an architecture that is computed here.
    """
    plain = text.lower()
    if plain.startswith("swinv2"):  # as its authors, and transformers, name it
        plain = plain.replace("-", "_").replace("_patch4", "")
    token = re.match(r"\w*", plain)[0]  # type: ignore[index]
    if re.search(r"(caffe|msra|detectron|bgr)", plain) and "resnet" in plain:
        raise UserError(
            f"{where} is a ResNet of the Caffe kind by its name, which takes steps and colours in "
            f"another way, and is not computed here: take torchvision's"
        )
    # As the authors of DINOv3 name theirs.
    own = re.match(
        r"dinov3[-_](?:vit(s|b|l|h|7b)16(plus)?|(convnext)[-_](tiny|small|base|large))(?![a-z])", plain
    )
    if own:
        variant = f"{own[3]}_{own[4][0]}" if own[3] else f"dinov3_{own[1]}16{own[2] or ''}"
        found = [x for x in TIMM.values() if x.variant == variant]
        return found[0] if found else exact(token, where)
    known = [name for name in TIMM if token == name or token.startswith(f"{name}_")]
    if not known:
        return exact(token, where) if _LIKE.fullmatch(token) else None
    found = TIMM[max(known, key=len)]
    return found._replace(gelu="quick") if _QUICK.match(plain) else found
