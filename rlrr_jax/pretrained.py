"""Pretrained ViT weights by name, file or address, read into our tree: `.npz` and `.safetensors`."""

import functools
import hashlib
import json
import math
import pathlib
import re
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import scipy.ndimage
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax import cards, download, files, layouts
from rlrr_jax.errors import UserError, first_line, unknown

ADDRESS = "https://storage.googleapis.com/vit_models/"
FOLDERS = ("imagenet21k/", "imagenet21k+imagenet2012/", "augreg/", "sam/", "gsam/")
HUB = "hf:"  # of Hugging Face, such as hf:timm/vit_base_patch16_224.augreg_in21k
BUNDLED = pathlib.Path(__file__).parent / "bundled" / "vit.npz"
# How a position embedding is brought to another grid: "linear" is SciPy's zoom, as in the public JAX
# code; "bicubic" is PyTorch's with antialiasing, as in timm; "bicubic_plain" is PyTorch's without, as
# in transformers.
RESIZES = ("linear", "bicubic", "bicubic_plain")


class How(NamedTuple):
    """How a weight file is read; None is what its `cards.Card` says.

    Attributes:
      grid: (rows, columns) of the file's position embedding, where it is not square.
      mean, std: of each colour, for pixels in [0, 1]. They are folded into the patch embedding, so that
        every model takes images in [-1, 1].
      resize: one of `RESIZES`.
    """

    grid: tuple | None = None
    mean: tuple | None = None
    std: tuple | None = None
    resize: str | None = None


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
    if "://" in name or name.startswith(HUB):
        return name
    if name.endswith((".npz", ".safetensors", cards.INDEX)) or files.local(name).exists():
        return name
    what = "weights (neither a name nor a .npz or .safetensors file)"
    raise unknown(what, name, ["bundled", *ALIASES])


def canonical(name):
    """One spelling for all names of the same weights; of a local file, without its folder."""
    file, subtree = split_subtree(name)
    where = address(file)
    if "://" not in where and not where.startswith(HUB):
        where = pathlib.Path(where).name
    return f"{where}:{subtree}" if subtree else where


def fetch(name, cache_dir=None):
    """Local path (with its `:subtree`, if any) and SHA-256 of weights, downloaded if need be."""
    file, subtree = split_subtree(name)
    where = address(file)
    if "://" in where:
        path, digest = download.cached(where, cache_dir)
    else:
        hub = where.startswith(HUB)
        path = download.from_hub(where.removeprefix(HUB), cache_dir) if hub else _local(where)
        digest = _sha256(path)
    return f"{path}:{subtree}" if subtree else str(path), digest


def check_size(image_size, patch):
    """Raises UserError if patches do not fill an image."""
    if image_size % patch or image_size < patch:
        raise UserError(
            f"image size {image_size} is not divisible by the patch size {patch}: set "
            f"config.image_size to {max(round(image_size / patch), 1) * patch}"
        )


def _sha256(path):
    """Hex SHA-256 of a file; of an index of shards that of their names and digests."""
    if not str(path).endswith(cards.INDEX):
        return download.sha256(path)
    text = "".join(f"{shard.name} {download.sha256(shard)}\n" for shard in _shards(path))
    return hashlib.sha256(text.encode()).hexdigest()


def _shards(path):
    """Paths of the `.safetensors` files that an index lists, beside it; UserError for a bad index."""
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        shards = [path.parent / pathlib.PurePath(name).name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is no index of .safetensors files ({e!r}): download it again") from e
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(f"{path.parent} lacks {', '.join(missing)}, which {path.name} lists: copy them")
    return shards


def _local(where):
    path = files.local(where)
    for name in ("model.safetensors", f"model{cards.INDEX}"):
        if path.is_dir() and (path / name).is_file():
            return path / name
    if not path.is_file():
        raise UserError(f"there is no weight file {path}: check config.pretrained.name")
    return path


def load(name_or_path, *, model, image_size, how=None, cache_dir=None, head=False, note=None):
    """Reads pretrained weights into the tree of `model`.

    Args:
      name_or_path: a known name (`ALIASES`, or a path below `ADDRESS` such as
        "imagenet21k/ViT-B_16"), "bundled", a local `.npz` (which may be followed by `:subtree`),
        `.safetensors` or index of several, a gs:// or https:// address, or `hf:timm/<name>`.
      model: the `vit.ViT` to fill.
      image_size: side of the images in pixels; the position embedding is resized to its grid.
      how: a `How`; None leaves all to the file's card.
      cache_dir: folder of downloaded files.
      head: whether to read the file's head, too.
      note: called with a sentence about arrays that were passed over, if there are any.

    Returns:
      A plain nested dict of float32 arrays; the head is zero unless it was asked for.

    Raises:
      UserError: if the file is missing or damaged, or if any name or shape differs from the
        model's; all of them are listed.
    """
    check_size(image_size, model.patch_size)
    path, subtree = split_subtree(_path(name_or_path, cache_dir))
    how = _filled(how or How(), model, path, str(name_or_path))
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    limit = 8 * sum(4 * x.size for x in jax.tree.leaves(shapes)) + 2**30
    flat, outside = _read(path, subtree, model.num_heads, limit)
    shapes = layouts.numbered(jax.tree.map(lambda x: np.broadcast_to(0.0, x.shape), shapes))
    side = image_size // model.patch_size
    before = _place_position(flat, (side, side), how, path)
    if note and before not in (None, (side, side)):
        note(
            f"note: the position embedding of {path} was resized from {before[0]} x {before[1]} to "
            f"{side} x {side} (pretrained.resize={how.resize})"
        )
    if not head:
        flat = {k: v for k, v in flat.items() if k not in ("head/kernel", "head/bias")}
    wanted = {k: v.shape for k, v in shapes.items() if head or not k.startswith("head/")}
    flat, unused = layouts.passed_over(flat, wanted)
    if note and (unused or outside):
        note(f"note: {path} has arrays that this model does not use: {_some([*outside, *unused])}")
    if problems := differences({k: v.shape for k, v in flat.items()}, wanted):
        raise UserError(f"{path} does not fit the model (check config.model): {'; '.join(problems)}")
    for name, value in flat.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise UserError(f"{name} in {path} is not made of finite floating-point numbers")
    if (tuple(how.mean), tuple(how.std)) != (cards.HALF, cards.HALF):
        flat = layouts.fold_pixels(flat, how.mean, how.std)
    zeros = {k: np.zeros(v.shape, np.float32) for k, v in shapes.items() if k.startswith("head/")}
    return unflatten_dict(layouts.stacked({**zeros, **flat}), sep="/")


def _filled(how, model, path, name):
    """A `How` without None; UserError if the file's card tells of another number of heads."""
    if how.mean is not None and how.resize is not None:
        return how
    card = cards.read(path, name, needed=how.mean is None)
    if card.num_heads not in (None, model.num_heads):
        raise UserError(
            f"{path} has {card.num_heads} attention heads ({card.source}), the model "
            f"{model.num_heads}: build it with num_heads={card.num_heads}"
        )
    mean, std = (card.mean, card.std) if how.mean is None else (how.mean, how.std)
    return How(how.grid, mean, std, how.resize or card.resize)


def _read(path, subtree, num_heads, limit):
    """The arrays of a file by our names, and the names of those that lie elsewhere in it."""
    if not path.endswith((".safetensors", cards.INDEX)):
        return layouts.from_jax(_read_npz(path, limit), subtree, path)
    index = path.endswith(cards.INDEX)
    flat = {}
    for shard in _shards(pathlib.Path(path)) if index else [pathlib.Path(path)]:
        flat |= _read_safetensors(shard, limit)
    hugging = layouts.of_transformers(flat)
    return (layouts.from_transformers if hugging else layouts.from_timm)(flat, num_heads, path)


def _some(names, most=5):
    """`"a, b, c (and 7 more)"`."""
    names = sorted(names)
    more = f" (and {len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _path(name, cache_dir):
    """Where a file is, with its `:subtree`; one that is local is not read for its SHA-256."""
    file, _ = split_subtree(name)
    where = address(file)
    if "://" in where or where.startswith(HUB):
        return fetch(name, cache_dir)[0]
    return str(name).replace(file, str(_local(where)), 1)


def save(path, params, dtype=np.float32):
    """Writes a tree as a compressed `.npz` in big_vision's scanned layout."""
    flat = {f"params/{k}": np.asarray(v, dtype) for k, v in flatten_dict(params, sep="/").items()}
    np.savez_compressed(path, **flat)


def _read_safetensors(path, limit):
    """All arrays of a `.safetensors` by name; floating-point ones as float32."""
    if path.stat().st_size > limit:
        raise UserError(
            f"{path} has {path.stat().st_size / 1e9:.1f} GB, far more than the model "
            f"needs: check config.model and config.pretrained.name"
        )
    try:
        with safetensors.safe_open(path, "numpy") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}
            if eight := [key for key, kind in kinds.items() if kind.startswith("F8")]:
                raise UserError(
                    f"{eight[0]} in {path} is float8 ({kinds[eight[0]]}), which says nothing of its "
                    f"scale: convert the file to float32 or bfloat16"
                )
            return {key: _float32(file.get_tensor(key)) for key in kinds}
    except UserError:
        raise
    except Exception as e:  # a damaged file can raise anything
        raise UserError(
            f"{path} is no readable .safetensors file ({first_line(e)}): it may be truncated; copy or "
            f"download it again"
        ) from e


def _read_npz(path, limit):
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


def _place_position(flat, target, how, path):
    """Brings the position embedding to `target` (rows, columns); a class-token row goes into `cls`.

    Returns the grid that it had, None if there is no position embedding.
    """
    position = flat.get("pos_embedding")
    if position is None or position.ndim != 3:
        return None  # reported with the other missing and mis-shaped names
    n, width = position.shape[1:]
    grid = how.grid
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
        position = resize_position(position.reshape(*grid, width), tuple(target), how.resize)
    flat["pos_embedding"] = np.ascontiguousarray(position.reshape(1, -1, width), np.float32)
    return tuple(grid)


def resize_position(position, target, rule):
    """A position embedding [h, w, D] on the grid `target` (rows, columns), by one of `RESIZES`."""
    if rule == "linear":
        zoom = (target[0] / position.shape[0], target[1] / position.shape[1], 1)
        return scipy.ndimage.zoom(position, zoom, order=1)
    if rule == "bicubic":
        shape = (*target, position.shape[-1])
        return np.asarray(jax.image.resize(position, shape, "cubic", antialias=True))
    rows, columns = (_bicubic(n, m) for n, m in zip(position.shape, target))
    return np.einsum("ih,jw,hwd->ijd", rows, columns, position, optimize=True)


@functools.cache
def _bicubic(old, new):
    """PyTorch's weights [new, old] of bicubic interpolation without antialiasing, a = -0.75.

    The four nearest of the old values, those beyond an edge are the edge's.
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(place - (first + tap))
        near = (1.25 * x - 2.25) * x * x + 1
        far = -0.75 * (((x - 5) * x + 8) * x - 4)
        np.add.at(
            weights,
            (np.arange(new), np.clip(first + tap, 0, old - 1)),
            np.where(x <= 1, near, np.where(x < 2, far, 0)),
        )
    return weights


def differences(found, wanted):
    """What differs between two dicts of shapes: `["missing: a, b", "unknown: c"]`."""
    shapes = [
        f"{k} is {found[k]} instead of {wanted[k]}"
        for k in sorted(wanted.keys() & found.keys())
        if found[k] != wanted[k]
    ]
    kinds = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "wrong shape": shapes,
    }
    return [f"{what}: {', '.join(names)}" for what, names in kinds.items() if names]
