"""What PyTorch state dicts of every family have: prefixes, and layouts that are refused by name."""

import re
from collections.abc import Iterable
from typing import Any

from rlrr_jax.errors import UserError

INDEX = ".safetensors.index.json"  # of a file in several shards
# Names of layouts that are known and not read.
_OTHER = (
    (r"conv_proj\.weight", "torchvision's names of a ViT"),
    (r"features\.0\.0\.weight", "torchvision's names of a Swin"),
    (r"(.*\.)?transformer\.resblocks\.\d+\..*", "open_clip's names"),
    (r"(.*\.)?embedder\.embedder\.convolution\.weight", "transformers' names of a ResNet"),
    (r"(bit\.)?embedder\.convolution\.weight", "transformers' names of BiT"),
    (r"(.*\.)?rope_embed\.periods", "rotary positions"),
)


def refuse(names: Iterable[str], path: Any) -> None:
    """UserError, which names the layout, for arrays whose names are of one that is not read here."""
    for name in names:
        for pattern, what in _OTHER:
            if re.fullmatch(pattern, name):
                raise UserError(
                    f"{path} has {what} ({name}), which are not read here: take timm's file of those "
                    f"weights, such as hf:timm/<name>"
                )


def one_model(flat: dict, stem: str, path: Any, preferred: tuple = ("",)) -> tuple[dict, list[str]]:
    """The arrays of a model without their prefix (`module.`, `encoder_q.`, ...), and other names.

    Args:
      flat: arrays by name.
      stem: pattern of the name of an array that each model has once, with the prefix as its group.
      path: where they are from, for messages.
      preferred: prefixes that are taken where there are several, the first first.

    Raises UserError if there are several models, none preferred; without any the arrays are returned.
    """
    prefixes = [match[1] for key in flat if (match := re.fullmatch(stem, key))]
    chosen = [prefix for prefix in preferred if prefix in prefixes]
    if not chosen and len(prefixes) > 1:
        raise UserError(f"{path} holds several models ({', '.join(prefixes)}): keep one of them")
    prefix = (chosen or prefixes or [""])[0]
    outside = [key for key in flat if not key.startswith(prefix)]
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}, outside
