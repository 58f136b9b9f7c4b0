"""Networks that stop early: an image that an exit is sure of does not pass the blocks after it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlrr_jax import adapters, cards, evaluate
from rlrr_jax.data import crops, resize
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.projects.exits import heads, met
from rlrr_jax.sides import Size, pair


class Stage(NamedTuple):
    """What an image passes from one exit to the next.

    Attributes:
      run: jitted function `(params, x) -> tokens, logits [B, C]`; the last returns no tokens.
      params: the tree that it takes.
      images: whether it begins with the images again, where each exit has a tree of its own.
    """

    run: Callable
    params: Any
    images: bool


class Exits(NamedTuple):
    """A tuned model with early exits.

    Attributes:
      model: the ViT.
      at: numbers of blocks after which there are exits.
      heads: their own values.
      trees: the merged tree, or one for each exit and the end, in order.
      card: the adapter's.
    """

    model: Any
    at: tuple
    heads: Any
    trees: list
    card: dict

    @property
    def own(self) -> bool:
        """Whether each exit has a tree of its own."""
        return len(self.trees) > 1


def places(adapter: adapters.Adapter) -> tuple[int, ...]:
    """The blocks after which an adapter has exits; none if it was trained without."""
    return tuple(adapter.card["config"].get("loss_kwargs", {}).get("at") or ())


def load(adapter: adapters.Adapter, backbone: adapters.Backbone) -> Exits:
    """Puts an adapter with exits on its backbone; UserError for one without."""
    if not (at := places(adapter)):
        raise UserError(
            "this adapter was trained without early exits: train one with config.loss=exits and "
            "config.loss_kwargs.at"
        )
    tuned = adapters.load(adapter, backbone)
    trees = [tuned.params]
    if met.is_met(cards.method(adapter)):
        trees = jax.jit(met.trees)(backbone.frozen, adapter.trainable)
    return Exits(tuned.model, at, adapter.trainable["loss"], trees, adapter.card)


def stages(exits: Exits) -> list[Stage]:
    """The parts of a model with exits."""
    run, out, begin = exits.card["config"], [], 0
    crop_from = run["crop_from"] if run["crop"] == crops.SQUARE else None
    for number, end in enumerate((*exits.at, None)):
        tree, first = (exits.trees[number], 0) if exits.own else (exits.trees[0], begin)
        size = cards.image_size(exits.card)
        part, cut = vit.part(exits.model, tree, slice(first, end), size)
        pixels = None if first else (size, crop_from)
        program = _program(part, exits.model, number, pixels, run["precision"])
        out.append(Stage(program, {"tree": cut, "heads": exits.heads}, not first))
        begin = end
    return out


@functools.lru_cache(64)
def _program(part: Any, model: Any, number: int, pixels: tuple | None, precision: str) -> Callable:
    """The jitted `Stage.run` of a part of a model, to the exit of a number or to the end."""

    @jax.jit
    def run(params: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        with jax.default_matmul_precision(precision):
            images = resize.normalize(x, *pixels) if pixels else x
            out = part.apply({"params": params["tree"]}, images)
            if not part.until:
                return None, out
            return out, heads.of_one(model, params["heads"], number, out)[0]

    return run


def classify(
    parts: list[Stage], images: Any, threshold: float, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, C] of images uint8 [N, h, w, 3], and the number [N] of the exit of each.

    An image leaves at the first exit whose largest probability is at least the threshold, or at the
    end. What is left goes on in full batches of one size, so that each stage is compiled once.

    Args:
      parts: what `stages` returned.
      images: uint8 [N, h, w, 3].
      threshold: from 0 (all leave at the first exit) to above 1 (none does).
      batch_size: images at once.
    """
    if not (number := len(images)):
        return np.zeros((0, len(parts[-1].params["tree"]["head"]["bias"])), np.float32), np.zeros(
            0, int
        )
    left, left_at = np.arange(number), np.full(number, len(parts) - 1)
    out, x = None, images
    for i, stage in enumerate(parts):
        tokens, found = _stage(stage, images[left] if stage.images else x, batch_size)
        out = np.zeros((number, found.shape[1]), np.float32) if out is None else out
        out[left] = found
        sure = found.max(1) >= threshold
        left_at[left[sure]] = i
        x, left = None if tokens is None else tokens[~sure], left[~sure]
        if not len(left):
            break
    return out, left_at


class Leaver:
    """`classify` of a model with exits and a threshold, which counts who leaves where."""

    def __init__(self, exits: Exits, threshold: float, batch_size: int):
        self.parts, self.threshold, self.batch_size = stages(exits), threshold, batch_size
        self.exits, self.size = exits, cards.image_size(exits.card)
        self.counts = np.zeros(len(self.parts), int)

    def __call__(self, images: Any) -> np.ndarray:
        """Probabilities [N, C] of images uint8 [N, h, w, 3]."""
        out, left = classify(self.parts, images, self.threshold, self.batch_size)
        self.counts += np.bincount(left, minlength=len(self.parts))
        return out

    def told(self) -> str:
        """How many images left where, and what that cost."""
        places = [f"block {number}" for number in self.exits.at] + ["the end"]
        left = ", ".join(f"{n} at {place}" for n, place in zip(self.counts, places))
        costs = flops(self.exits.model, self.exits.at, self.size, self.exits.own)
        whole = flops(self.exits.model, (), self.size)[-1]
        mean = self.counts @ costs / max(self.counts.sum(), 1) / whole
        return f"left {left}; {100 * mean:.0f} % of the FLOPs of the whole network"


def _stage(stage: Stage, x: Any, batch_size: int) -> tuple[Any, np.ndarray]:
    """Tokens and probabilities of all images at a stage."""
    tokens, probabilities = [], []
    for start in range(0, len(x), batch_size):
        batch = np.asarray(x[start : start + batch_size])
        found, logits = stage.run(stage.params, evaluate.pad(batch, batch_size))
        probabilities.append(np.asarray(jax.nn.softmax(logits))[: len(batch)])
        tokens.append(None if found is None else np.asarray(found)[: len(batch)])
    together = None if tokens[0] is None else np.concatenate(tokens)
    return together, np.concatenate(probabilities)


def every(parts: list[Stage], images: Any, batch_size: int, done: Callable = lambda n: None) -> Any:
    """Probabilities [N, E + 1, C] of all exits."""
    out = []
    for start in range(0, len(images), batch_size):
        batch = np.asarray(images[start : start + batch_size])
        x, mine = batch, []
        for stage in parts:
            x, found = _stage(stage, batch if stage.images else x, batch_size)
            mine.append(found)
        out.append(np.stack(mine, 1))
        done(len(batch))
    return np.concatenate(out)


def flops(model: Any, at: tuple, image_size: Size, own: bool = False) -> np.ndarray:
    """FLOPs [E + 1] of the matmuls until an image leaves at each exit, and at the end.

    Args:
      model: a ViT.
      at: numbers of blocks after which there are exits.
      image_size: size of the images, see `sides`.
      own: whether each exit has a tree of its own, and an image begins again after one it did not take.
    """
    height, width = pair(image_size)
    patches = height * width // model.patch_size**2
    tokens, d = patches + sum(model.tokens().values()), model.width
    stem = 2 * patches * 3 * model.patch_size**2 * d
    layers = 3 if getattr(model, "gated", False) else 2  # of the MLP
    block = 2 * tokens * (4 * d * d + layers * d * model.mlp_dim) + 4 * tokens**2 * d
    head, ends = 2 * d * model.num_classes, np.array((*at, model.depth))
    alone = stem + ends * block + head
    return np.cumsum(alone) if own else alone + head * np.arange(len(ends))
