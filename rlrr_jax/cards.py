"""What a backbone was trained with: its GELU, how its pixels were normalised, its image size."""

import json
import pathlib
import re
from typing import NamedTuple

import safetensors

from rlrr_jax.errors import UserError

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# What file names of timm and of the original code say, where nothing else does.
_BY_NAME = (
    (r"(^|[^a-z])(augreg|orig_in21k|sam_in1k)", (HALF, HALF)),
    (r"(^|[^a-z])(dino|mae|moco|deit)", IMAGENET),
)
_GELUS = {"gelu": "exact", "gelu_tanh": "tanh", "gelu_erf": "exact"}  # timm's act_layer


class Card(NamedTuple):
    """A backbone's habits.

    Attributes:
      gelu: "tanh" or "exact".
      mean, std: of each colour, for pixels in [0, 1]; all 0.5 is [-1, 1].
      source: where this is said.
      image_size: in pixels, if that is said.
      pooling: timm's name, if that is said; "token" is the class token.
    """

    gelu: str
    mean: tuple
    std: tuple
    source: str
    image_size: int | None = None
    pooling: str | None = None


JAX = Card("tanh", HALF, HALF, "its layout")


def of_jax(name):
    """Whether a name, path or address is of the public JAX weights' layouts: all have one card."""
    return not str(name).startswith("hf:") and not str(name).endswith(".safetensors")


def read(path, name="", needed=True):
    """The `Card` of a weight file.

    The public JAX weights (`.npz`) have tanh and [-1, 1]. A `.safetensors` has the exact GELU, and what
    says more is, in this order: its own header (written by our export), a timm `<file>.json` or
    `config.json` beside it, its name.

    Args:
      path: of the file.
      name: that it was asked for by.
      needed: False gives None instead of an error if nothing says how pixels are normalised.

    Raises UserError for that, for a damaged JSON or an unknown GELU.
    """
    path = pathlib.Path(path)
    if of_jax(path):
        return JAX
    found = _header(path)
    for config in (path.with_suffix(".json"), path.parent / "config.json"):
        found = found or _timm_config(config)
    if found:
        return found
    names = f"{pathlib.PurePath(name).name} {path.name}".lower()
    for pattern, (mean, std) in _BY_NAME:
        if re.search(pattern, names):
            return Card("exact", mean, std, "its name")
    if needed:
        raise UserError(
            f"nothing says how the pixels of {path} are normalised: put timm's config.json beside it, "
            f"or set config.pretrained.mean and config.pretrained.std (0.5 each for [-1, 1])"
        )
    return None


def check(gelu, mean, std):
    """ValueError unless these can be a GELU, and three means and standard deviations."""
    if gelu not in ("tanh", "exact"):
        raise ValueError(f"unknown GELU {gelu!r}")
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9
    for what, values in {"mean": mean, "std": std}.items():
        good = isinstance(values, list | tuple) and len(values) == 3 and all(map(number, values))
        if not good or (what == "std" and min(values) <= 0):
            raise ValueError(f"{what} {values!r} is not three numbers")


def _header(path):
    try:
        with safetensors.safe_open(path, "numpy") as file:
            said = json.loads((file.metadata() or {}).get("rlrr_jax", "{}"))
    except Exception:  # whoever reads its arrays says what is wrong
        return None
    if not isinstance(said, dict) or "mean" not in said:
        return None
    return _card(said.get("gelu"), said, said, path, "its header")


def _timm_config(path):
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        pixels = config.get("pretrained_cfg", config)
        gelu = (config.get("model_args") or {}).get("act_layer", "gelu")
        size = pixels.get("input_size")
        said = {"image_size": size and size[-1], "pooling": config.get("global_pool")}
        known = _GELUS.get(gelu)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is no config.json of timm ({e!r}): mend or remove it") from e
    if known is None:
        names = ", ".join(_GELUS)
        raise UserError(f"{path}: the activation {gelu} is none of {names}: take another model")
    return _card(known, pixels, said, path, path.name)


def _card(gelu, pixels, said, path, source):
    try:
        mean, std = pixels.get("mean"), pixels.get("std")
        check(gelu, mean, std)
    except (ValueError, AttributeError) as e:
        raise UserError(f"what {source} says of {path} is damaged ({e}): mend or remove it") from e
    return Card(gelu, tuple(mean), tuple(std), source, said.get("image_size"), said.get("pooling"))
