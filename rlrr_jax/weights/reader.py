"""Weight files read into a model's tree: `.npz` and `.safetensors`."""

import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax import models
from rlrr_jax.errors import UserError, first_line
from rlrr_jax.models import vit
from rlrr_jax.sides import Size, pair
from rlrr_jax.weights import (
    convnext_layouts,
    names,
    plain_layouts,
    positions,
    preprocessing,
    resnet_layouts,
    rope_layouts,
    state_dicts,
    swin_layouts,
    swinv2_layouts,
    vit_layouts,
    vit_transformers,
)

LAYOUTS = {
    "vit": vit_layouts,
    "rope_vit": rope_layouts,
    "swinv2": swinv2_layouts,
    "swin": swin_layouts,
    "resnet": resnet_layouts,
    "convnext": convnext_layouts,
    models.OTHER: plain_layouts,
}  # of each family of models


class How(NamedTuple):
    """How a weight file is read; None is what its `preprocessing.Card` says.

    Attributes:
      grid: (rows, columns) of the file's position embedding, where it is not square.
      mean, std: mean and standard deviation of each colour, for pixels in [0, 1]. They are folded
        into the patch embedding, so that every model takes images in [-1, 1].
      resize: one of `positions.RESIZES`.
      patch: whether a patch embedding of another size is resized to the model's.
      whole: number of blocks of a network of which the model has the first; None: it has all.
    """

    grid: tuple | None = None
    mean: tuple | None = None
    std: tuple | None = None
    resize: str | None = None
    patch: bool = False
    whole: int | None = None


def load(
    name_or_path: Any,
    *,
    model: Any,
    image_size: Size,
    how: How | None = None,
    cache_dir: str | None = None,
    head: bool = False,
    note: Callable | None = None,
) -> dict:
    """Reads pretrained weights into the tree of `model`.

    Args:
      name_or_path: a name, path or address of weights, see `names`.
      model: the model to fill, see `models.build`.
      image_size: size of the images in pixels, see `sides`; the position embedding is resized to its
        grid.
      how: a `How`; None leaves all to the file's card.
      cache_dir: folder of downloaded files.
      head: whether to read the file's head, too.
      note: function called with a sentence about arrays that were passed over, if there are any.

    Returns:
      A plain nested dict of float32 arrays; the head is zero unless it was asked for.

    Raises UserError if the file is missing or damaged, or if any name or shape differs from the
    model's; the first of them are listed.
    """
    models.check_size(model, image_size)
    path, subtree = names.split_subtree(names.local_path(name_or_path, cache_dir))
    how = _filled(how or How(), model, path, str(name_or_path))
    shapes = models.shapes(model, image_size)
    layouts, pixels = LAYOUTS[models.family_of(model)], (tuple(how.mean), tuple(how.std))
    mine = (getattr(model, "mean", preprocessing.HALF), getattr(model, "std", preprocessing.HALF))
    if not layouts.STEM and pixels != tuple(map(tuple, mine)):
        raise UserError(
            f"{path} was trained on pixels that this model does not take: build the model with "
            f"mean={pixels[0]}, std={pixels[1]}"
        )
    whole = model.clone(depth=how.whole) if how.whole else model
    flat, outside = _read(path, subtree, model, _limit(models.shapes(whole, image_size)))
    shapes = layouts.numbered(jax.tree.map(lambda x: np.broadcast_to(0.0, x.shape), shapes))
    if how.whole:
        flat = vit_layouts.first_blocks(flat, model.depth)
    if layouts is vit_layouts:
        _check_variant(path, flat, model, how)
        flat = vit_layouts.with_head(flat, model)
        if how.patch:
            positions.fit_patch(flat, model.patch_size, how, path, note)
    if isinstance(model, vit.ViT):
        grid = tuple(side // model.patch_size for side in pair(image_size))
        positions.place(flat, grid, how, path, note)
    ours = lambda key: head or not key.startswith("head/")
    flat = {k: v for k, v in flat.items() if ours(k) or k not in shapes}
    wanted = {k: v.shape for k, v in shapes.items() if ours(k)}
    unused = {key for key in flat if key not in wanted and layouts.UNUSED.fullmatch(key)}
    flat = {key: value for key, value in flat.items() if key not in unused}
    if note and (unused or outside):
        note(f"note: {path} has arrays that this model does not use: {_some([*outside, *unused])}")
    _check_arrays(path, flat, wanted)
    if layouts.STEM and pixels != (preprocessing.HALF, preprocessing.HALF):
        flat = vit_layouts.fold_pixels(flat, *pixels, layouts.STEM)
    zeros = {k: np.zeros(v.shape, np.float32) for k, v in shapes.items() if k.startswith("head/")}
    return unflatten_dict(layouts.stacked({**zeros, **flat}), sep="/")


def _limit(shapes):
    """Bytes that a file may take unpacked: room for a head and an optimiser's state, no more."""
    return 8 * sum(4 * x.size for x in jax.tree.leaves(shapes)) + 2**30


def _check_variant(path, flat, model, how):
    """UserError, naming it, if a file is of another variant: in its width or its patches."""
    shape = np.shape(flat.get("embedding/kernel", ()))  # [p, p, 3, width], but of hybrids
    if len(shape) != 4 or shape[0] != shape[1] or shape[2] != 3:
        return
    depth = len({key.split("/")[1] for key in flat if key.startswith("Transformer/encoderblock_")})
    sizes = {"width": shape[3], "depth": depth}
    fitting = [n for n, own in vit.VARIANTS.items() if {**own, **sizes} == own]
    patch = model.patch_size if how.patch else shape[0]
    if not fitting or (shape[3], patch) == (model.width, model.patch_size):
        return
    raise UserError(
        f"{path} has a width of {shape[3]} and patches of {shape[0]} pixels, the model {model.width} "
        f"and {model.patch_size}: set config.model.variant={fitting[0]}/{patch}"
    )


def _check_arrays(path, flat, wanted):
    """UserError unless names and shapes are the model's, and all values finite."""
    if problems := differences({k: v.shape for k, v in flat.items()}, wanted):
        raise UserError(f"{path} does not fit the model (check config.model): {'; '.join(problems)}")
    for name, value in flat.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise UserError(f"{name} in {path} is not made of finite floating-point numbers")


def _filled(how, model, path, name):
    """A `How` without None; UserError if the file's card tells of another number of heads."""
    if how.mean is not None and how.resize is not None:
        return how
    card = preprocessing.read(path, name, needed=how.mean is None)
    if isinstance(model, vit.ViT) and card.num_heads not in (None, model.num_heads):
        raise UserError(
            f"{path} has {card.num_heads} attention heads ({card.source}), the model "
            f"{model.num_heads}: build it with num_heads={card.num_heads}"
        )
    mean, std = (card.mean, card.std) if how.mean is None else (how.mean, how.std)
    return how._replace(mean=mean, std=std, resize=how.resize or card.resize)


def _read(path, subtree, model, limit):
    """The arrays of a file by our names, and the names of those that lie elsewhere in it."""
    family = models.family_of(model)
    if not path.endswith((".safetensors", state_dicts.INDEX)):
        if family == models.OTHER:
            return plain_layouts.read(_read_npz(path, limit)), []
        if family == "resnet":
            return resnet_layouts.from_jax(_read_npz(path, limit), path)
        if family != "vit":
            raise UserError(f"{path} is no file of such a model: give a .safetensors file")
        return vit_layouts.from_jax(_read_npz(path, limit), subtree, path)
    index = path.endswith(state_dicts.INDEX)
    flat = {}
    for shard in names.shards(pathlib.Path(path)) if index else [pathlib.Path(path)]:
        flat |= _read_safetensors(shard, limit)
    if family == models.OTHER:
        return plain_layouts.read(flat), []
    rope_layouts.check_variant(flat, model, path)
    if family != "rope_vit":
        state_dicts.refuse(flat, path)
    layouts = vit_transformers if family == "vit" else LAYOUTS[family]
    found: tuple = layouts.from_torch(flat, model, path)
    return found


def _some(names, most=5):
    """`"a, b, c (and 7 more)"`."""
    names = sorted(names)
    more = f" (and {len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def save(path: Any, params: Any, dtype: Any = np.float32) -> None:
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


def array_shapes(path: Any) -> dict[str, tuple]:
    """Names and shapes of a file's arrays; of an `.npz` only the names, with shapes ().

    What cannot be read has none here: whoever reads the arrays says what is wrong.
    """
    path = pathlib.Path(names.split_subtree(path)[0])
    try:
        if str(path).endswith(".npz"):
            with zipfile.ZipFile(path) as archive:
                return {name.removesuffix(".npy"): () for name in archive.namelist()}
        out = {}
        index = str(path).endswith(state_dicts.INDEX)
        for shard in names.shards(path) if index else [path]:
            with safetensors.safe_open(shard, "numpy") as file:
                out |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        return out
    except Exception:
        return {}


def differences(found: dict, wanted: dict) -> list[str]:
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
    return [f"{what}: {_some(names)}" for what, names in kinds.items() if names]
