"""What training does not change is computed once: the first blocks of a network, or all but its head.

A method says how many of the first blocks it leaves alone (`Method.untouched`). Their outputs for the
training and held-out images then take the place of the images, for all epochs, trials and seeds, and
the rest of the network the place of the model. Images that are flipped have two outputs. Where random
crops, mixing or drop path reach these blocks, there is nothing to compute once.
"""

import functools
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from rlrr_jax import blockwise, evaluate, losses, methods, models
from rlrr_jax.data.resize import enlarge, normalize
from rlrr_jax.models import vit
from rlrr_jax.recipe import Recipe
from rlrr_jax.run import Run
from rlrr_jax.runtime import distributed
from rlrr_jax.runtime import mesh as mesh_lib
from rlrr_jax.sides import pair

HEAD = -1  # instead of a number of blocks: all but the head
MOST_BYTES = 2**30  # of outputs in memory; more lie in a file that goes with the process
MOST_REPEATED = 2**24  # of inputs of a head that are there twice, as with flips: one program for both
MOST_FILE = 8 * 2**30  # of outputs of a run, training and held-out images together
MOST_KNOWN = 4  # sets of outputs that are kept: those of a search, and of the runs after it
BATCH = 64  # images that pass the prefix at once


class Head(nn.Module):
    """The head of a network, of its inputs [B, D]; takes and ignores what a model takes beside them."""

    num_classes: int

    @nn.compact
    def __call__(self, features, drop_path=0.0, keys=None):
        del drop_path, keys
        return nn.Dense(self.num_classes, dtype=features.dtype, name="head")(features)


def blocks(recipe: Recipe, run: Run) -> int:
    """How many of the first blocks a group of trials, of which `run` is the first, leaves alone.

    `HEAD` is all but the head; 0 if nothing can be computed once.
    """
    noisy = recipe.drop_path or recipe.mixing.images or run.crop is not None
    noisy = noisy or not losses.of(recipe).plain  # others may look at pixels, or at all blocks
    noisy = noisy or methods.asks_training(recipe.method)
    if recipe.method.untouched is None or noisy or blockwise.asked(run.limits):  # for want of room
        return 0
    depth = getattr(recipe.model, "depth", 0)
    number = recipe.method.untouched(depth)
    return HEAD if number > depth else number


def outputs(
    recipe: Recipe, frozen: Any, number: int, images: Any, mesh: Mesh, flip: bool, title: str
) -> np.ndarray:
    """What the first blocks make of images: [N, F, ...], F = 2 with flips (the second is flipped).

    Args:
      recipe: the `Recipe` of the whole network.
      frozen: its tree.
      number: number of blocks, or `HEAD`.
      images: uint8 [N, h, w, 3].
      mesh: the devices.
      flip: whether images are flipped, too.
      title: text before the progress bar.
    """
    run = program(recipe, number, flip, mesh)
    out, done, frozen = None, 0, mesh_lib.put(mesh, P(), frozen)
    labels = np.zeros(len(images), np.int32)
    shown = distributed.is_process_zero()
    with tqdm(total=len(images), desc=title, unit="img", delay=2, disable=not shown) as bar:
        for batch, _, mask in evaluate.batches(images, labels, BATCH, mesh):
            large = enlarge(batch, recipe.image_size)  # so that one program does for all sizes
            found = np.asarray(run(frozen, large))[: int(distributed.fetch(mask).sum())]
            if out is None:
                out = _room((len(images), *found.shape[1:]), found.dtype)
            out[done : done + len(found)] = found
            done += len(found)
            bar.update(len(found))
    assert out is not None
    return out


def _room(shape: tuple, dtype: Any) -> np.ndarray:
    """An empty array, in a file without a name if it is large."""
    if np.prod(shape) * np.dtype(dtype).itemsize <= MOST_BYTES:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)


def _bytes(recipe: Recipe, number: int, data: tuple, flip: bool) -> int:
    """What the outputs of training and held-out images take."""
    if number == HEAD:
        return 0  # a few values an image
    assert recipe.image_size is not None
    image = jax.ShapeDtypeStruct((1, *pair(recipe.image_size), 3), jnp.float32)
    first = recipe.model.clone(until=number)
    start = lambda image: first.init_with_output(jax.random.key(0), image)[0]
    tokens = jax.eval_shape(start, image)
    each = tokens.size * tokens.dtype.itemsize
    return each * (len(data[0]) * (1 + flip) + sum(map(len, data[1:])))


def _free() -> int:
    """Bytes that outputs may take: a third of what is free where temporary files lie."""
    free = shutil.disk_usage(tempfile.gettempdir()).free // 3
    return distributed.broadcast(int(min(free, MOST_FILE)))


def program(recipe: Recipe, number: int, flip: bool, mesh: Mesh) -> Callable:
    """What `outputs` compiles: `(frozen, images [B, H, W, 3]) -> [B, F, ...]`."""
    return _program(recipe.model, number, recipe.precision, (recipe.image_size, flip), mesh)


@functools.lru_cache(8)
def _program(model: Any, number: int, precision: str, pixels: tuple, mesh: Mesh) -> Callable:
    """A jitted function `(frozen, images) -> [B, F, ...]`, the same on every device."""
    size, flip = pixels

    def one(frozen: Any, images: jax.Array) -> jax.Array:
        if number == HEAD:
            return models.head_inputs(model, frozen, images)
        first, own = vit.part(model, frozen, slice(number))
        tokens: Any = first.apply({"params": own}, images)
        return tokens

    def both(frozen: Any, images: jax.Array) -> jax.Array:
        images = normalize(images, size)
        with jax.default_matmul_precision(precision):
            views = [images, images[:, :, ::-1]] if flip else [images]
            return jnp.stack([one(frozen, view) for view in views], 1)

    return jax.jit(both, out_shardings=NamedSharding(mesh, P()))


def rest(recipe: Recipe, frozen: Any, number: int) -> tuple[Any, Any]:
    """The recipe and tree of what comes after the first blocks; it takes their outputs for images."""
    model: Any
    if number == HEAD:
        model, tree = Head(recipe.model.num_classes), {"head": frozen["head"]}
    else:
        model, own = vit.part(recipe.model, frozen, slice(number, None), recipe.image_size)
        before = ("embedding", "pos_embedding", "pre_norm", *model.tokens())
        tree = {key: x for key, x in own.items() if key not in before}
    return recipe._replace(model=model, image_size=None), tree


def _keys(recipe: Recipe, frozen: Any, data: tuple, number: int, run: Run) -> list[tuple]:
    """What tells the outputs for training and held-out images from all others."""
    model = recipe.model.clone(num_classes=1)
    weights = jax.tree.leaves({name: x for name, x in frozen.items() if name != "head"})
    return [
        (id(images), id(weights[0]), model, number, recipe.precision, bool(run.flip and not i))
        for i, images in enumerate(data)
    ]


def applied(recipe: Recipe, frozen: Any, data: tuple, mesh: Mesh, run: Run, known: dict) -> tuple:
    """A group of trials with what nothing changes computed once; as it was if there is none of it.

    Args:
      recipe: the `Recipe`.
      frozen: the backbone's tree.
      data: images of the training set, and the sets of held-out images.
      mesh: the devices.
      run: the first trial.
      known: outputs that were computed before, which this keeps; by images, weights and program.

    Returns:
      The recipe, the tree, and the images in the same order.
    """
    number = blocks(recipe, run)
    if not number:
        return recipe, frozen, data
    where = "the head" if number == HEAD else f"block {number + 1}"
    wanted, kept = _bytes(recipe, number, data, run.flip), _keys(recipe, frozen, data, number, run)
    in_memory = wanted <= MOST_BYTES or all(key in known for key in kept)
    if not distributed.broadcast(in_memory) and wanted > (free := _free()):
        print(
            f"{run.label}: what reaches {where} would take {wanted / 1e9:.1f} GB, more than "
            f"the {free / 1e9:.1f} GB for it, and is computed each time"
        )
        return recipe, frozen, data
    print(f"{run.label}: what reaches {where} is computed once; images/s is of the rest")
    out = []
    for i, (images, key) in enumerate(zip(data, kept)):
        what = "held-out" if i else "training"
        flip = run.flip and not i
        if key not in known:
            title = f"{run.task.name}: {what} images up to {where}, once"
            arguments = number, images, mesh, flip, title
            # The images are kept, too, so that no others get their id.
            known[key] = outputs(recipe, frozen, *arguments), images, frozen
            for oldest in list(known)[:-MOST_KNOWN]:
                del known[oldest]
        found = known[key][0]
        if number == HEAD and not i and found.nbytes <= MOST_REPEATED:
            found = np.broadcast_to(found, (len(found), 2, found.shape[2]))
        out.append(found[:, 0] if i else found)
    recipe, frozen = rest(recipe, frozen, number)
    return recipe, frozen, tuple(out)
