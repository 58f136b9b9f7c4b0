"""Pretrained ViT weights: the public `.npz` layouts, read into our tree.

Layouts read: the original one of 2020 and AugReg (`encoderblock_<i>/MultiHeadDotProductAttention_1`,
`posembed_input`, a class-token row in the position embedding), big_vision's with numbered blocks and
with scanned blocks; each with or without a prefix, `pre_logits` and a head.
"""

import math
import pathlib
import re
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import scipy.ndimage
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax import download
from rlrr_jax.errors import UserError, unknown

ADDRESS = "https://storage.googleapis.com/vit_models/"
FOLDERS = ("imagenet21k/", "imagenet21k+imagenet2012/", "augreg/", "sam/", "gsam/")
BUNDLED = pathlib.Path(__file__).parent / "bundled" / "vit.npz"


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


def default_name(variant):
    """Name of the weights for a variant: the original ImageNet-21k ones where they exist, else AugReg.

    Returns None for a variant without public weights.
    """
    for name in (f"ViT-{variant.replace('/', '_')}", f"howto-i21k-{variant}"):
        if name in ALIASES:
            return ALIASES[name]
    return None


def split_subtree(name):
    """`"x.npz:params"` -> `("x.npz", "params")`; the subtree is "" where none is named."""
    match = re.fullmatch(r"(.*\.npz):(.*)", str(name))
    return match.groups() if match else (str(name), "")


def address(name):
    """Where a name, path or address (without subtree) is: a local path or an address, as a string.

    Raises UserError, with the nearest known name, for what is none of them.
    """
    name = str(name)
    if name == "bundled":
        return str(BUNDLED)
    name = ALIASES.get(name, name)
    if name.startswith(FOLDERS):
        return ADDRESS + name.removesuffix(".npz") + ".npz"
    if "://" in name or name.endswith(".npz") or pathlib.Path(name).expanduser().exists():
        return name
    raise unknown("weights (neither a name nor a .npz file)", name, ["bundled", *ALIASES])


def canonical(name):
    """One spelling for all names of the same weights; of a local file, without its folder."""
    file, subtree = split_subtree(name)
    where = address(file)
    where = where if "://" in where else pathlib.Path(where).name
    return f"{where}:{subtree}" if subtree else where


def fetch(name, cache_dir=None):
    """Local path (with its `:subtree`, if any) and SHA-256 of weights, downloaded if need be."""
    file, subtree = split_subtree(name)
    where = address(file)
    if "://" in where:
        path, digest = download.cached(where, cache_dir)
    else:
        path = _local(where)
        digest = download.sha256(path)
    return f"{path}:{subtree}" if subtree else str(path), digest


def check_size(image_size, patch):
    """Raises UserError if patches do not fill an image."""
    if image_size % patch or image_size < patch:
        raise UserError(
            f"image size {image_size} is not divisible by the patch size {patch}: set "
            f"config.image_size to {max(round(image_size / patch), 1) * patch}"
        )


def _local(where):
    path = pathlib.Path(where).expanduser()
    if not path.is_file():
        raise UserError(f"there is no weight file {path}: check config.pretrained.name")
    return path


def load(name_or_path, *, model, image_size, grid=None, cache_dir=None):
    """Reads pretrained weights into the tree of `model`.

    Args:
      name_or_path: a known name (`ALIASES`, or a path below `ADDRESS` such as
        "imagenet21k/ViT-B_16"), "bundled", a local `.npz`, or a gs:// or https:// address; a file
        may be followed by `:subtree`.
      model: the `vit.ViT` to fill.
      image_size: side of the images in pixels; the position embedding is resized to its grid by
        linear interpolation, as the public code does.
      grid: (rows, columns) of the file's position embedding, where it is not square.
      cache_dir: folder of downloaded files.

    Returns:
      A plain nested dict of float32 arrays; the head is zero.

    Raises:
      UserError: if the file is missing or damaged, or if any name or shape differs from the
        model's; all of them are listed.
    """
    check_size(image_size, model.patch_size)
    file, subtree = split_subtree(name_or_path)
    where = address(file)
    path = download.cached(where, cache_dir)[0] if "://" in where else _local(where)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    model_bytes = sum(4 * x.size for x in jax.tree.leaves(shapes))
    flat = _standard_names(_read(path, 8 * model_bytes + 2**30), subtree, path)
    shapes = _numbered({k: np.broadcast_to(0.0, v.shape) for k, v in _flatten(shapes).items()})
    side = image_size // model.patch_size
    _place_position(flat, (side, side), grid, path)
    wanted = {k: v.shape for k, v in shapes.items() if not k.startswith("head/")}
    _compare({k: v.shape for k, v in flat.items()}, wanted, path)
    for name, value in flat.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise UserError(f"{name} in {path} is not made of finite floating-point numbers")
    for name in ("head/kernel", "head/bias"):
        flat[name] = np.zeros(shapes[name].shape, np.float32)
    return unflatten_dict(_stacked(flat), sep="/")


def save(path, params, dtype=np.float32):
    """Writes a tree as a compressed `.npz` in big_vision's scanned layout."""
    flat = {f"params/{k}": np.asarray(v, dtype) for k, v in _flatten(params).items()}
    np.savez_compressed(path, **flat)


def _flatten(tree):
    return flatten_dict(tree, sep="/")


def _read(path, limit):
    """All arrays of an `.npz` by name; floating-point ones as float32.

    Args:
      limit: bytes that they may take unpacked: room for a head and an optimiser's state, no more.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > limit:
            raise UserError(
                f"{path} unpacks to {size / 1e9:.1f} GB, far more than the model needs: check "
                f"config.model and config.pretrained.name"
            )
        with np.load(path, allow_pickle=False) as file:
            return {key: _float32(file[key]) for key in file.files}
    except UserError:
        raise
    except ValueError as e:  # NumPy's answer to object arrays and to files that are no archive
        raise UserError(
            f"{path} holds pickled objects or is no .npz file, and is not read because a pickle can "
            f"run code: give a .npz file of plain arrays"
        ) from e
    except Exception as e:  # a damaged archive can raise anything
        raise UserError(
            f"{path} is no readable .npz file ({e or type(e).__name__}): it may be truncated; copy or "
            f"download it again"
        ) from e


def _float32(array):
    if array.dtype == np.dtype("V2"):  # how NumPy stores bfloat16
        array = array.view(ml_dtypes.bfloat16)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float32) if floating else array  # a step counter, say


def _standard_names(flat, subtree, path):
    """The arrays under the subtree by our names, blocks numbered, without head and pre_logits."""
    if subtree:
        subtree = subtree.strip("/") + "/"
        flat = {k.removeprefix(subtree): v for k, v in flat.items() if k.startswith(subtree)}
    stem = "embedding/kernel"
    prefixes = [k.removesuffix(stem) for k in flat if k == stem or k.endswith("/" + stem)]
    if not prefixes:
        where = f"{path} has no array '{subtree}{stem}'"
        raise UserError(f"{where}: it holds no Vision Transformer there; check the name")
    preferred = [p for p in ("", "params/", "opt/target/") if p in prefixes]
    if not preferred and len(prefixes) > 1:
        choices = " or ".join(f"{path}:{subtree}{p[:-1]}" for p in prefixes)
        raise UserError(f"{path} holds several trees of weights: write {choices}")
    prefix = (preferred or prefixes)[0]
    names = {}
    for key, value in flat.items():
        if not key.startswith(prefix):
            continue
        key = key.removeprefix(prefix)
        key = key.replace("MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/")
        key = key.replace("/LayerNorm_2/", "/LayerNorm_1/").replace("/MlpBlock_3/", "/MlpBlock_0/")
        key = re.sub(r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding", key)
        if not key.startswith(("head/", "pre_logits/")):
            names[key] = value
    return _numbered(names)


def _numbered(flat):
    """Splits scanned leaves: `encoderblock/x` [L, ...] becomes `encoderblock_0/x`, ..."""
    out = {}
    for key, value in flat.items():
        if key.startswith("Transformer/encoderblock/") and value.ndim:
            for i, part in enumerate(value):
                out[key.replace("encoderblock", f"encoderblock_{i}", 1)] = part
        else:
            out[key] = value
    return out


def _stacked(flat):
    """The inverse of `_numbered`."""
    out, blocks = {}, {}
    for key, value in flat.items():
        if match := re.match(r"Transformer/encoderblock_(\d+)/", key):
            name = key.replace(match[0], "Transformer/encoderblock/")
            blocks.setdefault(name, {})[int(match[1])] = value
        else:
            out[key] = value
    for name, parts in blocks.items():
        out[name] = np.stack([parts[i] for i in range(len(parts))])
    return out


def _place_position(flat, target, grid, path):
    """Brings the position embedding to `target` (rows, columns); a class-token row goes into `cls`."""
    position = flat.get("pos_embedding")
    if position is None or position.ndim != 3:
        return  # reported with the other missing and mis-shaped names
    n, width = position.shape[1:]
    square = lambda x: x > 0 and math.isqrt(x) ** 2 == x
    fits = n == math.prod(grid) if grid else n == math.prod(target)
    if grid:
        row = not fits and "cls" in flat and n - 1 == math.prod(grid)
        fits = fits or row
    else:
        row = not fits and "cls" in flat and square(n - 1)
        grid = target if fits else (math.isqrt(n - row),) * 2
        fits = fits or row or square(n)
    if not fits:
        raise UserError(
            f"the position embedding in {path} has {n} rows, which is neither {target[0]} x "
            f"{target[1]} nor a square: give its shape as config.pretrained.grid=(rows, columns)"
        )
    if row:
        if flat["cls"].shape == (1, 1, width):
            flat["cls"] = flat["cls"] + position[:, :1]
        position = position[:, 1:]
    if tuple(grid) != tuple(target):
        zoom = (target[0] / grid[0], target[1] / grid[1], 1)
        position = scipy.ndimage.zoom(position.reshape(*grid, width), zoom, order=1)
    flat["pos_embedding"] = np.ascontiguousarray(position.reshape(1, -1, width), np.float32)


def _compare(found, wanted, path):
    """Raises UserError listing every difference between two dicts of shapes."""
    missing = sorted(wanted.keys() - found.keys())
    extra = sorted(found.keys() - wanted.keys())
    shapes = [
        f"{k} is {found[k]} instead of {wanted[k]}"
        for k in sorted(wanted.keys() & found.keys())
        if found[k] != wanted[k]
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unknown", extra), ("wrong shape", shapes))
        if names
    ]
    if problems:
        raise UserError(f"{path} does not fit the model (check config.model): {'; '.join(problems)}")
