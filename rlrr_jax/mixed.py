"""A batch whose images name their adapters: `adapters.predict_mixed`.

Each adapter is merged once, and its images pass together. Or nothing is merged: RLRR of rank 1 is as
well a change of what goes through the network,

    x (W + W * s_in s_out) + b + f = (x W + b) + ((x * s_in) W) * s_out + f,

which may be another one for each image of a batch, for twice the products. `benchmarks/mixed.py`
measures which is faster.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax import adapters, cards, evaluate, metrics, models, sides
from rlrr_jax.data import resize
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.methods.sites import STACK

COLLECTION = "mixed"  # of flax, with the values of each image
PLAIN = {"rank": 1, "with_weight": True, "sides": "both", "residual": True, "layers": None}
FEW = 2  # images of an adapter, on average, below which they pass all at once


def predict(
    given: dict[str, Any],
    images: np.ndarray,
    names: Sequence[str],
    on: adapters.Backbone | None = None,
    merge: bool | None = None,
) -> list[np.ndarray]:
    """Probabilities of classes or labels, or the value, of each image, by the adapter that it names.

    Args:
      given: name -> `cards.Adapter`, its file, or an `adapters.Tuned` model, which is merged already;
        all of one backbone.
      images: uint8 [B, h, w, 3].
      names: of the adapter of each image [B].
      on: the `adapters.Backbone`; None reads that of the first.
      merge: whether weights are merged, each adapter's once; False changes activations instead, which
        plain RLRR alone can; None merges where that is faster.

    Returns:
      An array [C] for each image, with the number of classes of its adapter.

    Raises UserError for a name that is not there, adapters of several backbones or image sizes, and
    where nothing can be done without merging.
    """
    images, names = np.asarray(images), list(names)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(
            f"images must be uint8 [B, h, w, 3], not {images.dtype} {list(images.shape)}: stack them"
        )
    known = cards.Adapter, adapters.Tuned
    every = {k: x if isinstance(x, known) else adapters.read(x) for k, x in given.items()}
    for name in names:
        if name not in every:
            raise unknown("adapter", name, every)
    if len(names) != len(images):
        raise UserError(f"{len(names)} names are given for {len(images)} images: give one of each")
    if not every or not len(images):
        return []
    used = {name: every[name] for name in dict.fromkeys(names)}
    _check_alike(used)
    left = [adapter for adapter in used.values() if isinstance(adapter, cards.Adapter)]
    on = on or (adapters.backbone(left[0]) if left else None)
    for name, adapter in used.items():
        if isinstance(adapter, cards.Adapter) and not adapters.fits(adapter, on):
            raise UserError(f"the backbone is not that of the adapter {name}: give that, or none")
    size, crop_from = cards.pixels(used[names[0]].card)  # of all
    largest = sides.pair(crop_from or size)
    if any(a > b for a, b in zip(images.shape[1:3], largest)):
        raise UserError(
            f"images of {images.shape[1]} x {images.shape[2]} are larger than the {largest[0]} x "
            f"{largest[1]} that these models take: make them smaller"
        )
    if merge is None:
        merge = len(images) >= FEW * len(used) or not all(map(_plain, used.values()))
    if not merge and (bad := [name for name, adapter in used.items() if not _plain(adapter)]):
        raise UserError(
            f"the adapter {bad[0]} is no plain RLRR of rank 1 of a ViT that is not merged yet: leave "
            f"out merge=False"
        )
    logits = _merged(used, images, names, on) if merge else _unmerged(used, images, names, on)
    kind = {name: cards.answers(adapter.card)["kind"] for name, adapter in used.items()}
    return [metrics.KINDS[kind[name]].shares(np.asarray(x)) for name, x in zip(names, logits)]


def _check_alike(used: dict[str, Any]) -> None:
    """UserError unless all adapters are of one backbone, and take the same images."""
    first, *others = used
    keys = ("image_size", "image_width", "crop", "crop_from", "precision")
    how = lambda x: [x.card["config"][key] for key in keys]
    for name in others:
        mine, other = used[first].card, used[name].card
        if (mine["backbone_sha256"], cards.how(mine)) != (other["backbone_sha256"], cards.how(other)):
            raise UserError(
                f"the adapters {first} and {name} are of other backbones: give those of one"
            )
        if how(used[name]) != how(used[first]):
            raise UserError(
                f"the adapters {first} and {name} take other images: give those of one size"
            )


def _plain(adapter: Any) -> bool:
    """Whether an adapter is RLRR of rank 1 of a ViT, whose layers a batch passes image by image."""
    if isinstance(adapter, adapters.Tuned):
        return False
    card, run = adapter.card, adapter.run
    said = {key: card["method_kwargs"].get(key, value) for key, value in PLAIN.items()}
    plain = card["method"] == "rlrr" and said == PLAIN
    return plain and models.is_vit(card["model"]) and not run.model.get("block")


def _merged(used: dict, images: np.ndarray, names: Sequence[str], on: Any) -> list:
    """Logits of each image, of adapters that are merged one after another."""
    out: list[Any] = [None] * len(images)
    for name, adapter in used.items():
        mine = np.flatnonzero(np.array(names) == name)
        size = 1 << (len(mine) - 1).bit_length()  # so that few programs do
        tuned = adapter if isinstance(adapter, adapters.Tuned) else adapters.load(adapter, on)
        logits = tuned.logits(evaluate.pad(images[mine], size))
        for i, row in zip(mine, np.asarray(logits)):
            out[i] = row
    return out


# Without merging --------------------------------------------------------------------------------


def _unmerged(used: dict, images: np.ndarray, names: Sequence[str], on: Any) -> list:
    """Logits of each image, all at once, with the values of its adapter beside each."""
    which = np.array([list(used).index(name) for name in names])
    several = [adapter.trainable for adapter in used.values()]
    classes = [len(adapter.card["classes"]) for adapter in used.values()]
    widest, heads = max(classes), [tree["head"] for tree in several]
    wide = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, widest - x.shape[-1])])
    head = jax.tree.map(lambda *x: np.stack([wide(np.asarray(one)) for one in x]), *heads)
    values = jax.tree_util.tree_map_with_path(_stacked, *(tree["adapter"] for tree in several))
    size = 1 << (len(images) - 1).bit_length()
    first = next(iter(used.values()))
    program = _program(cards.model(first), cards.pixels(first.card), first.run.precision)
    frozen = {key: x for key, x in on.frozen.items() if key != "head"}
    padded = evaluate.pad(images, size), evaluate.pad(which, size)
    found = np.asarray(program(frozen, values, head, *padded))
    return [row[: classes[i]] for row, i in zip(found, which)]


def _stacked(path: tuple, *leaves: Any) -> np.ndarray:
    """Values of several adapters [A, ...], of a layer in each block [L, A, ...]."""
    return np.stack([np.asarray(x) for x in leaves], int(_inside(path)))


@functools.lru_cache(8)
def _program(model: Any, pixels: tuple, precision: str) -> Callable:
    """A jitted function `(frozen, values, head, images, which) -> logits [B, widest]`."""

    def logits(frozen: Any, values: Any, head: Any, images: jax.Array, which: jax.Array) -> jax.Array:
        take = lambda path, x: x[:, which] if _inside(path) else x[which]
        own = jax.tree_util.tree_map_with_path(take, values)
        none = {"kernel": jnp.zeros((head["kernel"].shape[1], 1)), "bias": jnp.zeros(1)}
        trees = {"params": {**frozen, "head": none}, COLLECTION: own}
        with jax.default_matmul_precision(precision), nn.intercept_methods(_changed):
            plain = model.clone(num_classes=1, unroll=1, attention=None)
            _, kept = plain.apply(trees, resize.normalize(images, *pixels), mutable=["pre_logits"])
            features = kept["pre_logits"]["features"][0].astype(jnp.float32)
            return jnp.einsum("bd,bdc->bc", features, head["kernel"][which]) + head["bias"][which]

    return jax.jit(logits)


def _inside(path: tuple) -> bool:
    return any(getattr(key, "key", None) == STACK for key in path)


def _changed(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """What a layer gives, changed as RLRR's merged weights would, by the values of each image."""
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    own = context.module.variables.get(COLLECTION) or {}
    if "scale" in own:
        y = call(*args, **kwargs)
        return y * _beside(own["scale"], y) + _beside(own["shift"], y)
    if "scale_in" not in own:
        return call(*args, **kwargs)
    (x,) = args
    both = call(jnp.concatenate([x, x * _beside(own["scale_in"], x)]), **kwargs)
    y, change = jnp.split(both, 2)
    if "bias" in (weights := context.module.variables["params"]):  # in both halves
        bias = weights["bias"].astype(y.dtype)
        change = change - bias.reshape(*(1,) * (y.ndim - bias.ndim), *bias.shape)
    moved = y + change * _beside(own["scale_out"], y)
    return moved + _beside(own["shift"], y) if "shift" in own else moved


def _beside(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values [B, ...] of each image beside x [B, tokens, ...]."""
    axes = tuple(range(1, 1 + x.ndim - values.ndim))
    return jnp.expand_dims(values, axes).astype(x.dtype)
