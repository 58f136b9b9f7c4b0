"""What a backbone was trained with: its GELU and how its pixels were normalised."""

import json
import pathlib
from typing import NamedTuple

import safetensors

from rlrr_jax.errors import UserError

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# What file names of timm and of the original code say, where nothing else does.
_BY_NAME = (
    (("augreg", "orig_in21k", "sam_in1k", "siglip"), (HALF, HALF)),
    (("dino", "mae", "moco", "deit"), IMAGENET),
)
_GELUS = {"gelu": "exact", "gelu_tanh": "tanh", "gelu_erf": "exact"}  # timm's act_layer


class Card(NamedTuple):
    """A backbone's habits.

    Attributes:
      gelu: "tanh" or "exact".
      mean, std: of each colour, for pixels in [0, 1]; all 0.5 is [-1, 1].
      source: where this is said.
    """

    gelu: str
    mean: tuple
    std: tuple
    source: str


def read(path, name="", mean=None, std=None):
    """The `Card` of a weight file.

    The public JAX weights (`.npz`) have tanh and [-1, 1]. A `.safetensors` has the exact GELU, and what
    says more is, in this order: its own header (written by our export), a timm `config.json` (or
    `<file>.json`) beside it, its name.

    Args:
      path: of the file.
      name: that it was asked for by.
      mean, std: what the configuration says, which is taken instead.

    Raises UserError if nothing says how pixels are normalised, or for an unknown GELU.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        return _given(Card("tanh", HALF, HALF, "its layout"), mean, std)
    found = _header(path)
    for config in (path.with_suffix(".json"), path.parent / "config.json"):
        found = found or _timm_config(config)
    if found:
        return _given(found, mean, std)
    for names, (known_mean, known_std) in _BY_NAME:
        if any(part in f"{name} {path.name}".lower() for part in names):
            return _given(Card("exact", known_mean, known_std, "its name"), mean, std)
    if mean is None:
        raise UserError(
            f"nothing says how the pixels of {path} are normalised: put timm's config.json beside it, "
            f"or set config.pretrained.mean and config.pretrained.std (0.5 each for [-1, 1])"
        )
    return Card("exact", tuple(mean), tuple(std), "the configuration")


def _given(card, mean, std):
    return card if mean is None else card._replace(mean=tuple(mean), std=tuple(std))


def _header(path):
    try:
        with safetensors.safe_open(path, "numpy") as file:
            said = json.loads((file.metadata() or {}).get("rlrr_jax", "{}"))
        return Card(said["gelu"], tuple(said["mean"]), tuple(said["std"]), "its header")
    except Exception:  # whoever reads its arrays says what is wrong
        return None


def _timm_config(path):
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        pixels = config.get("pretrained_cfg", config)
        mean, std = (tuple(float(x) for x in pixels[key]) for key in ("mean", "std"))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is no config.json of timm ({e!r}): mend or remove it") from e
    gelu = (config.get("model_args") or {}).get("act_layer", "gelu")
    if gelu not in _GELUS:
        raise UserError(
            f"{path}: the activation {gelu} is none of {', '.join(_GELUS)}: take another model"
        )
    return Card(_GELUS[gelu], mean, std, path.name)
