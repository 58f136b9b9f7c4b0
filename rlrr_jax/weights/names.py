"""Names of pretrained weights, and the files they stand for."""

import hashlib
import json
import pathlib
import re
import urllib.parse
import zipfile
from typing import Any

from rlrr_jax import files, hub
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.weights import architectures, download
from rlrr_jax.weights.state_dicts import INDEX

ADDRESS = "https://storage.googleapis.com/vit_models/"
FOLDERS = ("imagenet21k/", "imagenet21k+imagenet2012/", "augreg/", "sam/", "gsam/")
ENDINGS = (".npz", ".safetensors")
BUNDLED = pathlib.Path(__file__).parents[1] / "bundled" / "vit.npz"


def _augreg(model, setting):
    return f"augreg/{model}-i21k-300ep-lr_0.001-{setting}-do_0.0-sd_0.0"


# Short names; howto-i21k-* are big_vision's (models/vit.py): the models that Steiner et al.,
# "How to train your ViT?" (2021), recommend.
ALIASES = {
    "ViT-B_16": "imagenet21k/ViT-B_16",
    "ViT-B_32": "imagenet21k/ViT-B_32",
    "ViT-L_16": "imagenet21k/ViT-L_16",
    "ViT-L_32": "imagenet21k/ViT-L_32",
    "ViT-H_14": "imagenet21k/ViT-H_14",
    "howto-i21k-Ti/16": _augreg("Ti_16", "aug_none-wd_0.03"),
    "howto-i21k-S/32": _augreg("S_32", "aug_none-wd_0.1"),
    "howto-i21k-S/16": _augreg("S_16", "aug_light1-wd_0.03"),
    "howto-i21k-B/32": _augreg("B_32", "aug_light1-wd_0.1"),
    "howto-i21k-B/16": _augreg("B_16", "aug_medium1-wd_0.1"),
    "howto-i21k-B/8": _augreg("B_8", "aug_medium2-wd_0.1"),
    "howto-i21k-L/16": _augreg("L_16", "aug_strong1-wd_0.1"),
}


# What follows timm's name of an architecture on the Hub. Swin was pretrained on ImageNet-22k at 224 or
# 384 pixels (Liu et al., 2021), ResNets on ImageNet-1k: torchvision's, which the authors of RLRR took.
# DINOv3's are of its web images (LVD-1689M), under the DINOv3 licence; the smallest is EUPE's.
_TAGS = {
    r"resnet\d+": "tv_in1k",
    r"swin_\w+": "ms_in22k",
    r"swinv2_\w+_window(8|16)_256": "ms_in1k",
    r"swinv2_\w+_window12_192": "ms_in22k",
    r"swinv2_\w+to\d+": "ms_in22k_ft_in1k",
    r"convnext_\w+": "fb_in22k",
    r"vit_(?!tiny)\w+_dinov3": "lvd1689m",
    r"vit_tiny_patch16_dinov3_qkvb": "eupe_lvd1689m",
    r"vit_pe_core_\w+": "fb",
    r"eva02_\w+_224": "mim_in22k",
}
OTHERS = {
    found.variant: f"hf:timm/{name}.{tag}"
    for pattern, tag in _TAGS.items()
    for name, found in architectures.TIMM.items()
    if re.fullmatch(pattern, name)
}


def default_name(variant: str) -> str | None:
    """Name of the weights for a variant: the original ImageNet-21k ones where they exist, else AugReg.

    Returns None for a variant without public weights.
    """
    if variant in OTHERS:
        return OTHERS[variant]
    if match := re.fullmatch(r"bit_(\d+)x(\d)", variant):
        return f"https://storage.googleapis.com/bit_models/BiT-M-R{match[1]}x{match[2]}.npz"
    for name in (f"ViT-{variant.replace('/', '_')}", f"howto-i21k-{variant}"):
        if name in ALIASES:
            return ALIASES[name]
    return None


def split_subtree(name: Any) -> tuple[str, str]:
    """`"x.npz:params"` -> `("x.npz", "params")`; the subtree is "" where none is named."""
    match = re.fullmatch(r"(.*\.npz(?:\?[^:]*)?):(.*)", str(name))
    return match.groups() if match else (str(name), "")


def address(name: Any) -> str:
    """Where a name, path or address (without subtree) is: a local path or an address, as a string.

    Raises UserError, with the nearest known name, for what is none of them.
    """
    name = str(name)
    if name == "bundled":
        return str(BUNDLED)
    name = ALIASES.get(name, name)
    if name.startswith(hub.PREFIX):
        return name
    if "://" in name:
        if not urllib.parse.urlsplit(name).path.endswith(ENDINGS):
            raise UserError(
                f"{name} ends in neither .npz nor .safetensors: give the address of such a file"
            )
        return name
    here = name.endswith(".safetensors") or files.local(name).exists()
    if name.startswith(FOLDERS) and re.fullmatch(r"[\w+]+/[\w.+-]+", name) and not here:
        return ADDRESS + name.removesuffix(".npz") + ".npz"
    if name.endswith((*ENDINGS, INDEX)) or here:
        return name
    what = "weights (neither a name nor a .npz or .safetensors file)"
    raise unknown(what, name, ["bundled", *ALIASES])


def canonical(name: Any) -> str:
    """One spelling for all names of the same weights; of a local file, without its folder."""
    file, subtree = split_subtree(name)
    where = address(file)
    if "://" not in where and not where.startswith(hub.PREFIX):
        where = pathlib.Path(where).name
    return f"{where}:{subtree}" if subtree else where


def fetch(
    name: Any, cache_dir: str | None = None, wanted: str | None = None, fetch: bool = True
) -> tuple[str, str]:
    """Local path (with its `:subtree`, if any) and SHA-256 of weights, downloaded if need be.

    Args:
      name: a name, path or address of weights.
      cache_dir: folder of caches; None is the default, see `files.cache`.
      wanted: SHA-256 that a downloaded file must have; None: any.
      fetch: whether it may be downloaded if it is not on this machine.

    Raises:
      hub.NotFetched: if it is not on this machine and must not be downloaded.
      UserError: if it is not there, or is no file that is read here.
    """
    file, subtree = split_subtree(name)
    where = address(file)
    if "://" in where:
        path, digest = download.cached(where, cache_dir, wanted, fetch)
    else:
        if where.startswith(hub.PREFIX):
            path = hub.weights(where.removeprefix(hub.PREFIX), cache_dir, wanted, fetch)
        else:
            path = _local(where)
        digest = _sha256(path)
    return f"{path}:{subtree}" if subtree else str(path), digest


def _sha256(path):
    """Hex SHA-256 of a file; of an index of shards that of their names and digests."""
    if not str(path).endswith(INDEX):
        return files.sha256(path)
    text = "".join(f"{shard.name} {files.sha256(shard)}\n" for shard in shards(path))
    return hashlib.sha256(text.encode()).hexdigest()


def shards(path: Any) -> list:
    """Paths of the `.safetensors` files that an index lists, beside it; UserError for a bad index."""
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if other := [name for name in names if pathlib.PurePath(name).name != name or "\\" in name]:
            raise ValueError(f"it names {other[0][:80]!r}, which is no file beside it")
        shards = [path.parent / name for name in names]
        missing = [shard.name for shard in shards if not shard.is_file()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is no index of .safetensors files ({e!r}): download it again") from e
    if missing:
        raise UserError(f"{path.parent} lacks {', '.join(missing)}, which {path.name} lists: copy them")
    return shards


def _local(where):
    path = files.local(where)
    if path.is_dir():
        for name in ("model.safetensors", f"model{INDEX}"):
            if (path / name).is_file():
                return path / name
        there = sorted(p for p in path.iterdir() if p.suffix in _CONVERSIONS or p.suffix in ENDINGS)
        for other in there:
            _check_kind(other)
        has = f", but {', '.join(p.name for p in there)}: name the file" if there else ": name another"
        raise UserError(f"{path} has no model.safetensors{has}")
    if not path.is_file():
        raise UserError(f"there is no weight file {path}: check its name")
    _check_kind(path)
    return path


_TORCH = (
    "a pickle of PyTorch",
    "import torch, safetensors.torch as s; d = torch.load('{0}', weights_only=True); "
    "s.save_file({{k: v.clone() for k, v in d.get('model', d).items()}}, '{1}.safetensors')",
)
_FLAX = (
    "Flax's msgpack",
    "import numpy, flax; from flax.traverse_util import flatten_dict as f; "
    "d = open('{0}', 'rb').read(); "
    "numpy.savez('{1}.npz', **f(flax.serialization.msgpack_restore(d), sep='/'))",
)
_KERAS = ("HDF5", "")
_CONVERSIONS = dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar"), _TORCH)
_CONVERSIONS |= {".msgpack": _FLAX, ".h5": _KERAS, ".hdf5": _KERAS}


def _check_kind(path):
    """UserError, with the lines that convert it, for a file of a kind that is not opened here."""
    with open(path, "rb") as file:
        first = file.read(9)
    if path.suffix == ".safetensors" and first[4:] == b"\0\0\0\0{":  # a length, and a header
        return
    kind = None if path.suffix in ENDINGS else _CONVERSIONS.get(path.suffix)
    if first[:4] == b"\x89HDF":
        kind = _KERAS
    elif first[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04") or _pickled(path):
        kind = _TORCH
    if kind is None:
        return
    what, lines = kind
    why = "can run code, and is never opened here" if kind is _TORCH else "is not read here"
    way = f"convert it where you trust it, by {lines.format(path, path.with_suffix(''))}"
    way = way if lines else "take a .npz or .safetensors file of those weights"
    raise UserError(f"{path} is {what}, which {why}: {way}")


def _pickled(path):
    """Whether a file is PyTorch's archive of a pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # a damaged archive can raise anything, and its reader says what is wrong
        return False


def local_path(name: Any, cache_dir: str | None) -> str:
    """Where a file is, with its `:subtree`; one that is local is not read for its SHA-256."""
    file, _ = split_subtree(name)
    where = address(file)
    if "://" in where or where.startswith(hub.PREFIX):
        return fetch(name, cache_dir)[0]
    return str(name).replace(file, str(_local(where)), 1)
