"""What a group of trials needs and does not change: weights and data on the devices, built once."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from rlrr_jax import answers, blockwise, evaluate, heads, methods, models, prefix, sides, step
from rlrr_jax import feed as feed_lib
from rlrr_jax import run as run_lib
from rlrr_jax.data import folds, resize
from rlrr_jax.errors import UserError, out_of_memory
from rlrr_jax.recipe import Hyper, Recipe
from rlrr_jax.run import Run
from rlrr_jax.runtime import distributed, memory
from rlrr_jax.runtime import mesh as mesh_lib

MOST_ENLARGED = 2**30  # bytes of a training set whose images are enlarged before training


class Job(NamedTuple):
    """All that a group of trials needs and does not change. Arrays are on the mesh.

    Where the trials do not fill the mesh, the last one is trained several times; T counts these, too.

    Attributes:
      runs: the trials, which differ in their seed and in what `Hyper` has.
      recipe: what is fixed while the step is traced.
      mesh: devices with axes ("trial", "data").
      frozen: the backbone's weights.
      data: `images`, enlarged, and `labels` of the training set; where they come in parts, only the
        shapes.
      feed: where the training images come from.
      held_out: images and labels of the evaluation after epochs, on the host.
      tested: those of the test at the end, where they are others; or None.
      hyper: the `Hyper` of the trials [T].
      init_keys: keys of the trials [T] for the first values.
      merge: function `(frozen, trained [T, ...]) -> params [T, ...]`, jitted.
      begun: when this was begun, by `time.perf_counter`.
    """

    runs: list[Run]
    recipe: Recipe
    mesh: Mesh
    frozen: Any
    data: dict
    feed: feed_lib.Feed
    held_out: tuple
    tested: tuple | None
    hyper: Hyper
    init_keys: Any
    merge: Callable
    begun: float

    @property
    def classes(self) -> int:
        """Number of classes of the task; the head may have more, see `heads`."""
        return self.runs[0].task.classes

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return self.runs[0].epochs

    def steps(self, epoch: int) -> int:
        """Steps of an epoch; `config.total_steps` may end the last one early."""
        before, run = epoch * self.recipe.steps, self.runs[0]
        return int(min(self.recipe.steps, (run.total_steps or math.inf) - before))

    def start(self) -> tuple[Any, Any]:
        """State and metrics before training."""
        state, metrics = step.map_start(self.recipe, self.mesh)(self.init_keys, self.frozen)
        for name in {"trainable", "average"} & state.keys():
            state[name] = heads.hide(state[name], self.classes)
        if not methods.asks_training(self.recipe.method):
            return state, metrics
        recipe, frozen = self.recipe, self.frozen
        pixels = recipe.image_size, recipe.crop_from
        training = methods.Training(recipe.model, frozen, pixels, recipe.precision, self._batches)
        init: Any = recipe.method.init
        adapters = [distributed.fetch(init(r.keys[0], frozen, training=training)) for r in self.runs]
        adapters += adapters[-1:] * (len(self.init_keys) - len(self.runs))
        for name in {"trainable", "average"} & state.keys():
            state[name] = {**state[name], "adapter": mesh_lib.put_trials(self.mesh, adapters)}
        return state, metrics

    def _batches(self) -> Iterator[tuple]:
        """The training images on the mesh, see `methods.Training`, with a progress bar."""
        number, size = len(self.feed.labels), self.recipe.batch_size
        order = np.asarray(jax.random.permutation(self.feed.order_key, number))  # else by class
        images, labels = folds.Picked(self.feed.images, order), self.feed.labels[order]
        shown = distributed.is_process_zero()
        title = f"{self.runs[0].label}: training images"
        every = evaluate.batches(images, labels, size, self.mesh)
        yield from tqdm(every, title, -(-number // size), delay=2, disable=not shown, unit="batch")

    def shapes(self) -> tuple[Any, Any]:
        """Shapes and shardings of what `start` returns."""
        start = step.map_start(self.recipe, self.mesh)
        return mesh_lib.abstract(start, self.mesh, self.init_keys, self.frozen)

    def compile(self, state: Any, metrics: Any) -> Callable:
        """The program of a whole run, compiled once: `(data, state, metrics, epoch, start, stop)`.

        Raises memory.TooLarge if it needs more memory than there is and something can be done.
        """
        scalars = lambda *values: tuple(mesh_lib.put(self.mesh, P(), jnp.int32(i)) for i in values)
        arguments = self.frozen, self.data, state, metrics, self.hyper, scalars(0, 0, 0)
        shapes, tree = jax.tree.flatten(jax.tree.map(_shape, arguments))
        with fitting(self):
            compiled = _compiled(self.recipe, self.mesh, tuple(shapes), tree)
        check_memory(self, compiled.memory_analysis(), memory.limit())

        def train_steps(data: Any, state: Any, metrics: Any, *chunk: int) -> tuple[Any, Any]:
            return compiled(self.frozen, data, state, metrics, self.hyper, scalars(*chunk))

        return train_steps

    @contextlib.contextmanager
    def parts(self, epoch: int, step: int) -> Iterator[Iterator[tuple[int, int, dict]]]:
        """What is left to train: an epoch, the step of it to stop before, and the data until there.

        Args:
          epoch: the epoch to go on in.
          step: the step of that epoch to go on from.
        """
        todo = (
            (now, *part)
            for now in range(epoch, self.epochs)
            for part in self.feed.parts(now, step if now == epoch else 0, self.steps(now))
        )
        if not self.feed.renewed:
            yield ((now, stop, self.data) for now, _, stop, _ in todo)
            return

        def load(part: tuple, cancelled: Any) -> tuple[int, int, dict]:
            now, start, stop, which = part
            data = self.feed.read(now, start, which, cancelled)
            return now, stop, mesh_lib.put(self.mesh, P(), data)

        with feed_lib.ahead(load, todo) as parts:
            yield parts


def build(
    runs: list[Run], load_weights: Callable, load_data: Callable, known: dict | None = None
) -> Job:
    """Reads weights and data and puts everything on the devices.

    Args:
      runs: the trials, see `Job`.
      load_weights: function `model -> frozen`.
      load_data: function `(split, crop=None) -> images, labels`, see `store.load_split` and
        `load_crops`.
      known: what `prefix.applied` keeps from one group to the next.
    """
    begun = time.perf_counter()
    run, recipe = runs[0], run_lib.together(runs)
    images, labels = load_data(run.splits[0], crop=run.crops)
    held_out = [load_data(split) for split in (run.splits[1], run.tested) if split]
    if len(labels) != recipe.num_images:
        raise UserError(
            f"{run.task.name} has {len(labels)} images in {run.splits[0]}, and its task says "
            f"{recipe.num_images}: correct its sizes"
        )
    frozen = load_weights(recipe.model)
    if "block" in recipe.method.DEFAULTS:
        print(
            f"{run.label}: folds into no weight, a tuned model computes "
            f"{overhead(recipe, frozen):.1%} more for each image"
        )
    if run.class_weights is not None:
        (weights,) = answers.class_weights(run.class_weights, labels, run.task).values()
        least, most = weights.min(), weights.max()
        print(f"{run.label}: images count {least:.3g} to {most:.3g} times, by their class")
    mesh = run_lib.mesh_of(runs, jax.devices())
    known, every = {} if known is None else known, (images, *(x for x, _ in held_out))
    recipe, frozen, every = prefix.applied(recipe, frozen, every, mesh, run, known)
    recipe, frozen = blockwise.applied(recipe, frozen, run.limits)
    images, held_out = every[0], [(x, y) for x, (_, y) in zip(every[1:], held_out)]
    gigabytes = run.limits.image_gb
    budget = memory.limit() * feed_lib.SHARE if gigabytes is None else gigabytes * 1e9
    feed = feed_of(runs, images, labels, budget)
    trials = [*runs, *runs[-1:] * (-len(runs) % mesh.shape["trial"])]
    data = feed.shapes(mesh) if feed.renewed else _whole(recipe, mesh, feed, budget)
    return Job(
        runs=runs,
        recipe=recipe,
        mesh=mesh,
        frozen=mesh_lib.put(mesh, None, frozen),
        data=data,
        feed=feed,
        held_out=held_out[0],
        tested=held_out[1] if run.tested else None,
        hyper=mesh_lib.put_trials(mesh, [trial.hyper(labels) for trial in trials]),
        init_keys=mesh_lib.put_trials(mesh, [trial.keys[0] for trial in trials]),
        merge=step.map_merge(recipe.method, mesh),
        begun=begun,
    )


def overhead(recipe: Recipe, frozen: Any) -> float:
    """How many more FLOPs a tuned model needs for an image than the backbone, as a share of those."""
    assert recipe.image_size is not None  # a prefix is of methods that train the last blocks
    image = jax.ShapeDtypeStruct((1, *sides.pair(recipe.image_size), 3), jnp.float32)
    start = methods.start(recipe.method, jax.random.key(0), frozen)
    tuned = jax.eval_shape(functools.partial(methods.merge, recipe.method), frozen, start)

    def flops(params: Any) -> float:
        apply = jax.jit(lambda params, image: recipe.model.apply({"params": params}, image))
        cost = apply.lower(params, image).cost_analysis()
        assert cost is not None
        return cost["flops"]

    return flops(tuned) / flops(frozen) - 1


def feed_of(runs: list[Run], images: Any, labels: Any, budget: float) -> feed_lib.Feed:
    """Where training images come from; memory.TooLarge if the trials need them in several orders."""
    run, size = runs[0], runs[0].recipe.batch_size
    steps = distributed.broadcast(feed_lib.steps_at_once(images, size, budget) or 0)
    if steps and len({r.seed for r in runs}) > 1:
        raise memory.TooLarge(1, "one after another, since streamed images come in the order of a seed")
    feed = feed_lib.Feed(images, labels, size, steps or None, run.keys[2])
    if steps:
        takes = math.prod(images.shape) * images.dtype.itemsize / 1e9
        print(
            f"{run.task.name}: {len(labels):,} training images take {takes:.3g} GB, more than the "
            f"{budget / 1e9:.3g} GB for them on a device: {feed.slots:,} are there at once"
        )
    return feed


def _whole(recipe: Recipe, mesh: Mesh, feed: feed_lib.Feed, budget: float) -> dict[str, Any]:
    """The training set on the devices; its images enlarged once, unless that takes much memory."""
    data = mesh_lib.put(mesh, P(), feed.read(0, 0, slice(None)))
    size = recipe.crop_from or recipe.image_size
    if size is None or data["images"].shape[1:3] == sides.pair(size):
        return data
    takes = math.prod((len(feed.labels), *sides.pair(size), 3))
    if distributed.broadcast(takes <= min(MOST_ENLARGED, budget)):
        data["images"] = resize.enlarge_all(data["images"], size)
    return data


def forget() -> None:
    """Forgets all compiled programs: where code was edited and loaded again in a running Python."""
    run_lib.forget()
    kept = _compiled, step.map_start, step.map_merge, evaluate.map_eval_step, models.cached_shapes
    for cached in kept:
        cached.cache_clear()


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@functools.lru_cache(64)
def _compiled(recipe: Recipe, mesh: Mesh, shapes: tuple, tree: Any) -> Any:
    """`step.map_train_steps` compiled for arguments of these shapes, flattened."""
    arguments = jax.tree.unflatten(tree, shapes)
    lowered: Any = step.map_train_steps(recipe, mesh)
    return lowered.lower(*arguments).compile()


@contextlib.contextmanager
def fitting(job: Job) -> Iterator[None]:
    """Raises memory.TooLarge where a compiler refuses what does not fit, as those of TPUs do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if out_of_memory(e) is None:
            raise
        groups, run = job.mesh.shape["trial"], job.runs[0]
        here = -(-len(job.runs) // groups)
        if here == 1 and run.limits.recompute is not None:
            twice = ", though activations are computed twice" * run.limits.recompute
            raise UserError(
                f"a step of {run.label} does not fit into a device's memory{twice}: raise "
                f"config.accumulate, lower config.batch_size, or take a smaller model"
            ) from e
        raise memory.TooLarge(groups * (here // 2)) from e


def check_memory(job: Job, needs: Any, limit: int) -> None:
    """Raises memory.TooLarge if the trials on a device need more bytes than the limit.

    One trial passes if `config.model.remat` has been decided.

    Args:
      needs: what `memory_analysis()` of the compiled program says of one device.
      limit: bytes of a device.
    """
    groups = job.mesh.shape["trial"]
    here = -(-len(job.runs) // groups)
    whole = needs.argument_size_in_bytes + needs.temp_size_in_bytes  # outputs lie in donated arguments
    shared = memory.size((job.frozen, job.data))
    if job.feed.renewed:  # the next images come before the last ones go
        whole, shared = (n + memory.size(job.data) for n in (whole, shared))
    whole, shared, limit = distributed.broadcast([whole, shared, limit])
    if whole <= limit:
        return
    fits = min(max(0, int((limit - shared) / ((whole - shared) / here))), here - 1)
    if not fits and job.runs[0].limits.recompute is None:
        raise memory.TooLarge(0)
    if here > 1:
        raise memory.TooLarge(groups * max(1, fits))
