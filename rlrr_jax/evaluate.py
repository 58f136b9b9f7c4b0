"""Answers to held-out images, in padded batches of one shape; `metrics` judges them."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from rlrr_jax.data.resize import enlarge, normalize
from rlrr_jax.runtime import distributed, memory
from rlrr_jax.runtime import mesh as mesh_lib

CHECK_SECONDS = 3  # between two looks of several processes at whether to stop


def eval_step(model: Any, pixels: tuple, precision: str, params: Any, images: jax.Array) -> jax.Array:
    """Logits [b, classes] of this device's images [b, h, w, 3] uint8.

    `pixels` are the side of the images that the model takes (None: they are outputs of first blocks,
    see `prefix`), and of what their middle is cut from, or None.
    """
    with jax.default_matmul_precision(precision):
        inputs = images if pixels[0] is None else normalize(images, *pixels)
        return model.apply({"params": params}, inputs)


@functools.lru_cache(8)
def map_eval_step(
    model: Any, image_size: Any, precision: str, mesh: Mesh, crop_from: int | None = None
) -> Callable:
    """`eval_step` for all trials on a mesh, jitted: `(params [T, ...], images) -> [T, B, classes]`."""
    one = functools.partial(eval_step, model, (image_size, crop_from), precision)

    @functools.wraps(eval_step)
    def trials(params: Any, images: jax.Array) -> Any:
        if len(jax.tree.leaves(params)[0]) == 1:
            return mesh_lib.over_trials(one, (0, None))(params, images)
        # One after another: a batch of one fills the device.
        return jax.lax.map(lambda params: one(params, images), params)

    def mapped(params: Any, images: jax.Array) -> Any:
        return jax.shard_map(
            trials,
            mesh=mesh,
            in_specs=(mesh_lib.specs(params, mesh, "trial"), P("data")),
            out_specs=P("trial", "data"),
            check_vma=False,
        )(params, images)

    return jax.jit(functools.wraps(eval_step)(mapped))


def pad(array: np.ndarray, number: int) -> np.ndarray:
    """An array [n, ...] with zeros behind it, so that it has `number` rows."""
    padding = np.zeros((number - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, padding]) if len(padding) else array


def batches(images: Any, labels: Any, size: int, mesh: Mesh) -> Iterator[tuple]:
    """Batches of a split on the mesh as (images, labels, mask), all of one shape.

    The last is padded, and so is each to a multiple of the devices; padding has mask 0. Each process
    reads what its devices need.
    """
    size = min(size, len(labels))
    slots = math.ceil(size / mesh.shape["data"]) * mesh.shape["data"]
    sharding = NamedSharding(mesh, P("data"))
    columns = (images, images.dtype), (labels, labels.dtype), (np.ones(len(labels)), np.float32)
    for start in range(0, len(labels), size):
        count = min(size, len(labels) - start)

        def shard(array, dtype, index, start=start, count=count):
            low, high, _ = index[0].indices(slots)
            real = array[start + low : start + max(low, min(high, count))]
            return pad(np.asarray(real, dtype), high - low)

        yield tuple(
            jax.make_array_from_callback(
                (slots, *array.shape[1:]), sharding, functools.partial(shard, array, dtype)
            )
            for array, dtype in columns
        )


def evaluate(
    step: Callable,
    params: Any,
    images: Any,
    size: int,
    mesh: Mesh,
    done: Callable[[int], None] = lambda number: None,
) -> np.ndarray:
    """Logits [T, N, classes] of a split, streamed in batches, whole in every process.

    Args:
      step: function made by `map_eval_step`.
      params: trees of the trials [T, ...], on the mesh.
      images: uint8 [N, h, w, 3].
      size: number of images in a batch.
      mesh: the devices.
      done: function called after each batch with its number of images; may raise to end this.
    """
    out: list[Any] = []
    for i, (batch, *_) in enumerate(batches(images, np.zeros(len(images), np.int32), size, mesh)):
        out.append(step(params, batch))
        if i > 1:  # so that few batches are on the device
            out[i - 2] = distributed.fetch(out[i - 2])
        done(min(size, len(images) - i * size))
    last = len(images) - (len(out) - 1) * min(size, len(images))
    out = [*map(distributed.fetch, out)]
    cut = [x[:, :size] for x in out[:-1]] + [out[-1][:, :last]]
    return np.concatenate(cut, 1)


def trials(
    job: Any, trainable: Any, images: Any, title: str, check: Callable[[], None]
) -> list[np.ndarray]:
    """Logits [N, classes] of each trial, with a progress bar.

    Args:
      job: the `job.Job`.
      trainable: the trained trees [T, ...], on the mesh.
      images: uint8 [N, h, w, 3], or outputs of first blocks, see `prefix`.
      title: text before the bar.
      check: function called every now and then, in all processes after the same batch.
    """
    recipe, mesh, number = job.recipe, job.mesh, len(images)
    how = recipe.image_size, recipe.precision, mesh, recipe.crop_from
    program, large = map_eval_step(recipe.model, *how), recipe.crop_from or recipe.image_size

    def step(params: Any, images: jax.Array) -> Any:
        return program(params, images if large is None else enlarge(images, large))

    out: list[Any] = [None] * len(job.init_keys)
    together = at_once(job, memory.limit())
    total = number * -(-len(out) // (together * mesh.shape["trial"]))
    shown = distributed.is_process_zero()
    with tqdm(total=total, unit="img", desc=title, leave=False, delay=2, disable=not shown) as bar:
        for which, part in mesh_lib.turns(trainable, mesh, together):
            params, done = job.merge(job.frozen, part), looking(check, bar)
            size = job.runs[0].limits.eval_batch_size
            for i, logits in zip(which, evaluate(step, params, images, size, mesh, done)):
                out[i] = logits[:, : job.classes]
    return out[: len(job.runs)]


def at_once(job: Any, limit: int) -> int:
    """How many trials each device evaluates at once: all, or as many as merged trees fit.

    Args:
      limit: bytes of a device; a fifth of what is left beside weights and data is for activations.
    """
    here = len(job.init_keys) // job.mesh.shape["trial"]
    fit = int(0.8 * (limit - memory.size((job.frozen, job.data))) // memory.size(job.frozen))
    fit = distributed.broadcast(max(1, min(here, fit)))
    return max(n for n in range(1, fit + 1) if here % n == 0)  # of one size, compiled once


def looking(check: Callable[[], None], bar: tqdm) -> Callable[[int], None]:
    """A function for each evaluated batch: it moves the bar, and checks.

    Among several processes a check is a collective that all wait for, so it comes about every
    `CHECK_SECONDS`, counted in batches that process 0 has timed.
    """
    batches, every, begun = 0, 1, time.monotonic()

    def done(number: int) -> None:
        nonlocal batches, every, begun
        bar.update(number)
        batches += 1
        if batches == 2 and distributed.several():  # the first compiles
            seconds = max(time.monotonic() - begun, 1e-6)
            every = distributed.broadcast(max(1, int(CHECK_SECONDS / seconds)))
        begun = time.monotonic()
        if batches % every == 0:
            check()

    return done
