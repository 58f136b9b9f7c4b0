"""Training from top to bottom: weights and data in, the epochs, a row of results out for each trial."""

import contextlib
import importlib.metadata
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from rlrr_jax import adapters, checkpoint, distributed, files, methods, optim, report, step
from rlrr_jax import config as config_lib
from rlrr_jax.data import tasks
from rlrr_jax.errors import UserError

DISPATCH_SECONDS = 10  # a dispatch should last no longer, so that progress and Ctrl-C come through


def splits(run):
    """Which split a run trains on and which it is evaluated on."""
    train, val, both = tasks.get(run.task).parts
    return (train, val) if run.protocol == "tune" else (both, "test")


class Stopped(BaseException):
    """The run was asked to stop, and all that was done is saved. Like Ctrl-C, nothing catches it."""


class Stop:
    """Whether to stop. Nothing is lost before and between trainings, and there it is raised at once."""

    def __init__(self):
        self.asked, self._training = False, False

    def __call__(self):
        return self.asked

    def ask(self, *_):
        """To stop; the handler of a signal."""
        self.asked = True
        if not self._training:
            raise Stopped

    @contextlib.contextmanager
    def training(self):
        """Where the one who trains asks whether to stop."""
        self._training = True
        try:
            yield
        finally:
            self._training = False


class TooLarge(Exception):
    """The trials do not fit into the memory of the devices; `fits` of them should, or not even one."""

    def __init__(self, fits):
        super().__init__(f"only {fits} trials fit at once")
        self.fits = fits


class Job(NamedTuple):
    """All that a group of trials needs and does not change. Arrays are on the mesh.

    Attributes:
      runs: fully specified configurations that differ in seed, lr, weight_decay and drop_path.
      crops: the `crops.Crops` that make the images of `data` anew in each epoch, or None.
      lrs: of each trial and step.
      hyper, init_keys: have a leading trial axis.
    """

    runs: list
    recipe: step.Recipe
    mesh: Any
    frozen: Any
    data: dict
    crops: Any
    held_out: tuple
    lrs: list
    hyper: dict
    init_keys: Any

    def steps(self, epoch):
        """Steps of an epoch; `config.total_steps` may end the last one early."""
        before, run = epoch * self.recipe.steps, self.runs[0]
        return min(self.recipe.steps, (run.total_steps or math.inf) - before)


def prepare(runs, weights, load_data):
    """Reads weights and data and lays everything on the devices.

    Args:
      runs: the trials, see `Job`.
      weights: path of the pretrained weights.
      load_data: `(split, crop=None) -> images, labels`, see `store.load_split` and `load_crops`.
    """
    run = runs[0]
    part, held_out = splits(run)
    images, labels = load_data(part, crop=run.crop)
    held_out = load_data(held_out)
    model, method = config_lib.build_model(run), methods.get(run.method, **run.method_kwargs)
    frozen = config_lib.load_weights(run, weights, model)
    recipe = step.Recipe(
        model=model,
        method=method,
        batch_size=run.batch_size,
        num_images=len(labels),
        image_size=run.image_size,
        flip=run.flip,
        drop_path=any(r.drop_path > 0 for r in runs),
        precision=run.precision,
        optimizer=optim.Optimizer(run.optimizer, run.momentum_dtype, run.grad_clip),
    )
    mesh = step.make_mesh(jax.devices()[: run.num_devices], len(runs))
    lrs = [
        optim.learning_rates(
            r.schedule, r.lr, r.epochs, recipe.steps, r.total_steps, r.warmup_steps or 0
        )
        for r in runs
    ]
    keys = [jax.random.split(jax.random.key(r.seed), 3) for r in runs]  # init, noise, order
    hyper = [
        {
            "lr": jnp.array(lr),
            "weight_decay": jnp.array(r.weight_decay),
            "drop_path": jnp.array(r.drop_path),
            "noise_key": key[1],
            "order_key": key[2],
        }
        for r, lr, key in zip(runs, lrs, keys)
    ]
    if run.crop:  # the images come with each epoch
        shape = (len(labels), run.image_size, run.image_size, 3)
        crops, images = images, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=step.place(mesh, P()))
    else:
        crops, images = None, step.put(mesh, P(), images[:])
    return Job(
        runs=runs,
        recipe=recipe,
        mesh=mesh,
        frozen=step.put(mesh, P(), frozen),
        data={"images": images, "labels": step.put(mesh, P(), labels)},
        crops=crops,
        held_out=held_out,
        lrs=lrs,
        hyper=step.put_trials(mesh, hyper),
        init_keys=step.put_trials(mesh, [key[0] for key in keys]),
    )


def train_together(
    runs,
    folders,
    labels,
    title,
    checkpoints,
    weights,
    marks,
    classes,
    load_data,
    tell=lambda clock, epochs: None,
    stop=None,
):
    """Trains one method on one task: a trial, or several at once. Writes each `result.json` last.

    Args:
      runs: the trials, see `Job`.
      folders: of each trial's files.
      labels: of each trial, for its picture.
      title: of them together, for the screen.
      checkpoints: folder of the checkpoints.
      weights: path of the pretrained weights.
      marks: `backbone_sha256` and `dataset`, saved with the configuration and the result.
      classes: their names.
      load_data: `split -> images, labels`.
      tell: called after each epoch with the clock and the number of epochs done.
      stop: a `Stop`; asked after each dispatch and each batch that is evaluated.

    Raises TooLarge if several do not fit into memory, before any step; Stopped if `stop` said so;
    UserError if no trial's loss is finite.
    """
    clock, stop = Clock(), stop or Stop()
    job = prepare(runs, weights, load_data)
    recipe, epochs = job.recipe, runs[0].epochs
    for run, folder in zip(runs, folders):
        if distributed.lead():
            files.write_json(folder / "config.json", {**run.to_dict(), **marks})
    with checkpoint.open_manager(checkpoints) as manager:
        keeper = checkpoint.Keeper(manager, runs[0].checkpoint_seconds)
        state, metrics, first, start = _start_or_resume(job, keeper, clock)
        histories = [_history(folder, first) for folder in folders]
        if first or start:
            print(f"{title}: goes on at epoch {first + 1}, step {start}", flush=True)
        train_steps = compile_train_steps(job, state, metrics) if first < epochs else None
        total = recipe.images_before(epochs - 1, job.steps(epochs - 1))
        done, many = recipe.images_before(first, start), len(runs)
        size = dict(total=total * many, initial=done * many, unit="img")
        bar = tqdm(**size, desc=title, disable=not distributed.lead())
        with bar, stop.training(), contextlib.ExitStack() as stack:
            for epoch, data in stack.enter_context(contextlib.closing(epochs_data(job, first))):

                def check(step, state, metrics, epoch=epoch):
                    """Stops here if asked to, saved."""
                    if distributed.any_of(stop()):
                        keeper.save_if_due(state, metrics, clock.place(epoch, step), True)
                        raise Stopped

                state, metrics = train_epoch(
                    job, train_steps, data, state, metrics, epoch, start, keeper, clock, bar, check
                )
                steps, sums = job.steps(epoch), distributed.fetch(metrics)
                held_out = evaluate(job, state, epoch, lambda: check(job.steps(epoch), state, metrics))
                for i, folder in enumerate(folders):
                    lr = job.lrs[i][epoch * recipe.steps + steps - 1]
                    row = {"epoch": epoch, "lr": lr, **_means(recipe, sums, i, steps)}
                    histories[i].append({**row, **held_out[i], "seconds": clock.elapsed()})
                    if distributed.lead():
                        files.write_rows(folder / "metrics.jsonl", histories[i])
                metrics, start = jax.tree.map(jnp.zeros_like, metrics), 0
                last = epoch + 1 == epochs
                keeper.save_if_due(state, metrics, clock.place(epoch + 1, 0), last)
                tell(clock, epoch + 1)
    state = distributed.fetch(state["trainable"])
    for i, (run, folder) in enumerate(zip(runs, folders)):
        if not distributed.lead():
            break
        trainable = jax.tree.map(lambda x: x[i], state)
        accuracy = {key: histories[i][-1].get(key) for key in ("train_acc", "val_acc", "test_acc")}
        card = adapters.card(run, marks, classes, accuracy)
        adapters.write(folder / "adapter.safetensors", adapters.Adapter(trainable, card))
        report.curves(folder / "curves.png", {labels[i]: histories[i]})
        files.write_json(
            folder / "result.json", _result(job, run, trainable, histories[i], marks, clock)
        )
    distributed.wait("results")


def _history(folder, epochs):
    """The first rows of a trial's `metrics.jsonl`."""
    rows = [r for r in files.read_rows(folder / "metrics.jsonl") if r["epoch"] < epochs]
    if len(rows) != epochs:
        raise UserError(
            f"{folder}/metrics.jsonl lacks some of the {epochs} epochs of the checkpoint beside it: "
            f"delete {folder} to start this run again"
        )
    return rows


class Clock:
    """Time spent on a group of trials over all its starts, and their training speed."""

    def __init__(self):
        self.begun = time.perf_counter()
        self.images, self.seconds = 0, 0.0  # trained by all trials, and the time of that alone

    def elapsed(self):
        """Seconds since training first began, without the time between two starts."""
        return time.perf_counter() - self.begun

    def steps(self, images):
        """Steps that take `DISPATCH_SECONDS`; one as long as the speed is not known.

        Args:
          images: of a step, over all trials.
        """
        if not self.seconds:
            return 1
        return max(1, int(DISPATCH_SECONDS * self.images / self.seconds / images))

    def place(self, epoch, step):
        """How far the run is, for a checkpoint."""
        return [epoch, step, self.elapsed(), self.images, self.seconds]

    def resume(self, place):
        """Goes on counting where a checkpoint stopped; returns its epoch and step."""
        epoch, step, elapsed, self.images, self.seconds = map(float, place)
        self.begun -= elapsed
        return int(epoch), int(step)


def _start_or_resume(job, keeper, clock):
    """State, metrics, epoch and step to go on from."""
    begin = step.map_start(job.recipe, job.mesh)
    like = step.abstract(begin, job.mesh, job.init_keys, job.frozen)
    if found := keeper.restore(like, len(clock.place(0, 0))):
        state, metrics, place = found
        return state, metrics, *clock.resume(place)
    return *begin(job.init_keys, job.frozen), 0, 0


def compile_train_steps(job, state, metrics):
    """The program of a whole run, compiled once: `(data, state, metrics, epoch, start, stop)`.

    Raises TooLarge if it needs more memory than there is and has more than one trial to leave out.
    """
    scalar = lambda i: step.put(job.mesh, P(), jnp.int32(i))
    args = (job.frozen, job.data, state, metrics, job.hyper, scalar(0), scalar(0), scalar(0))
    compiled = step.map_train_steps(job.recipe, job.mesh).lower(*args).compile()
    check_memory(job, compiled.memory_analysis(), device_memory(jax.local_devices()[0]))

    def train_steps(data, state, metrics, *place):
        return compiled(job.frozen, data, state, metrics, job.hyper, *map(scalar, place))

    return train_steps


def device_memory(device):
    """Bytes that a program may use: what an accelerator reports, 0.7 of a CPU's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return int(0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def check_memory(job, needs, limit):
    """TooLarge if the trials on a device need more bytes than the limit.

    One trial passes if `config.model.remat` has been decided.

    Args:
      needs: `memory_analysis()` of the compiled program, of one device.
    """
    groups = job.mesh.shape["trial"]
    here = len(job.runs) // groups
    whole = needs.argument_size_in_bytes + needs.temp_size_in_bytes  # outputs lie in donated arguments
    shared = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((job.frozen, job.data)))
    if job.crops:  # the next epoch's images come before the last one's go
        whole, shared = (n + job.data["images"].size for n in (whole, shared))
    whole, shared, limit = distributed.agree([whole, shared, limit])
    if whole <= limit:
        return
    fits = min(max(0, int((limit - shared) / ((whole - shared) / here))), here - 1)
    if not fits and job.runs[0].model.remat is None:
        raise TooLarge(0)
    if here > 1:
        raise TooLarge(groups * max(1, fits))


def epochs_data(job, first):
    """Each epoch from `first` and its images; random crops are made while the one before runs."""
    epochs = range(first, job.runs[0].epochs)
    if job.crops is None or not epochs:
        yield from ((epoch, job.data) for epoch in epochs)
        return
    with ThreadPoolExecutor(1) as pool:
        crops = pool.submit(job.crops.epoch, first)
        try:
            for epoch in epochs:
                images = crops.result()
                crops = pool.submit(job.crops.epoch, epoch + 1) if epoch + 1 < epochs.stop else None
                yield epoch, {**job.data, "images": step.put(job.mesh, P(), images)}
        finally:
            job.crops.cancel()


def train_epoch(job, train_steps, data, state, metrics, epoch, start, keeper, clock, bar, check):
    """Steps `start` to the end of an epoch, in one dispatch where the machine is fast enough.

    `check(step, state, metrics)` is called after each dispatch.
    """
    recipe, many, steps = job.recipe, len(job.runs), job.steps(epoch)
    while start < steps:
        stop = min(start + distributed.agree(clock.steps(recipe.batch_size * many)), steps)
        begun = time.perf_counter()
        state, metrics = train_steps(data, state, metrics, epoch, start, stop)
        jax.block_until_ready(metrics)
        images = many * (recipe.images_before(0, stop) - recipe.images_before(0, start))
        clock.seconds += time.perf_counter() - begun
        clock.images += images
        sums = distributed.fetch(metrics)
        check_finite(job, sums["loss"], epoch, start, stop)
        start = stop
        check(start, state, metrics)
        if start < steps:
            keeper.save_if_due(state, metrics, clock.place(epoch, start))
        means = _means(recipe, sums, 0, start)  # of the first trial
        bar.set_postfix(
            epoch=f"{epoch + 1}/{job.runs[0].epochs}",
            loss=f"{means['train_loss'] or math.nan:.3f}",
            acc=f"{means['train_acc']:.3f}",
            refresh=False,
        )
        bar.update(images)
    return state, metrics


def check_finite(job, losses, epoch, start, stop):
    """UserError if no trial has a finite loss any more; the last checkpoint stays what it was.

    Of the protocol "tune" any may diverge: it is not chosen, and no reason to end a search.

    Args:
      losses: of each trial and step of this epoch.
    """
    finite = np.isfinite(losses[:, start:stop])
    if finite.all(1).any() or job.runs[0].protocol == "tune":
        return
    step = start + int(np.argmin(finite[0]))
    run = job.runs[0]
    raise UserError(
        f"the loss of {run.task} {run.method} is not finite at step {step + 1} of epoch {epoch + 1}, "
        f"learning rate {job.lrs[0][epoch * job.recipe.steps + step]:g}: lower config.lr and choose "
        f"another --workdir; the checkpoint before that is kept"
    )


def evaluate(job, state, epoch, check):
    """Each trial's held-out accuracy and loss after an epoch; [{}, ...] where the protocol has none.

    `check` is called before each batch.
    """
    run, recipe = job.runs[0], job.recipe
    last = epoch + 1 == run.epochs
    if not last and (run.protocol in ("fast", "vtab") or epoch == 0):  # the authors skip epoch 0 too
        return [{}] * len(job.runs)
    key = "val" if run.protocol == "tune" else "test"
    params = step.map_merge(recipe.method.merge, job.mesh)(job.frozen, state["trainable"])
    eval_step = step.map_eval_step(recipe.model, recipe.image_size, recipe.precision, job.mesh)
    out = step.evaluate(eval_step, params, *job.held_out, run.eval_batch_size, job.mesh, check)
    both = zip(out["accuracy"], out["loss"])
    return [{f"{key}_acc": float(accuracy), f"{key}_loss": _number(loss)} for accuracy, loss in both]


def _number(x):
    """A float, None if it is not finite: JSON has no such numbers."""
    return float(x) if math.isfinite(x) else None


def _means(recipe, metrics, trial, steps=None):
    """A trial's mean loss and accuracy over the images of the first `steps` steps of an epoch."""
    steps = steps or recipe.steps
    loss, correct = (np.asarray(metrics[k], np.float64)[trial, :steps] for k in ("loss", "correct"))
    sizes = np.diff([recipe.images_before(0, i) for i in range(steps + 1)])
    return {
        "train_loss": _number((loss * sizes).sum() / sizes.sum()),
        "train_acc": float(correct.sum() / sizes.sum()),
    }


def _result(job, run, trainable, history, marks, clock):
    """One row of `results.json`."""
    tested = [row for row in history if "test_acc" in row]
    best = max(tested, key=lambda row: row["test_acc"]) if run.protocol == "official" else None
    same = ("task", "method", "seed", "trial", "lr", "weight_decay", "drop_path", "drop_path_mode")
    same += (
        "optimizer",
        "momentum_dtype",
        "grad_clip",
        "total_steps",
        "warmup_steps",
        "crop",
        "crop_from",
    )
    same += ("schedule", "flip", "epochs", "batch_size", "protocol", "image_size", "dtype", "precision")
    return {
        "identity": config_lib.fingerprint([run], marks),
        **{key: run[key] for key in same},
        "method_kwargs": run.method_kwargs.to_dict(),
        "options": run.options,
        "grid": run.grid.to_dict() if "grid" in run else None,  # that "vtab" chose from
        "init": {**methods.options(run.method), **run.method_kwargs}.get("init"),
        "source": run.data.source,
        "dataset": marks["dataset"],
        "variant": run.data.variant,
        "backbone": run.pretrained.name,
        "backbone_sha256": marks["backbone_sha256"],
        "model": run.model.variant,
        "gelu": run.model.gelu,
        "attention": run.model.attention,
        "trainable_params": methods.trainable_count(trainable),
        "head_params": methods.head_count(trainable),
        "train_loss": history[-1]["train_loss"],
        "val_acc": history[-1].get("val_acc", run.get("val_acc")),  # "vtab": of the chosen trial
        "test_acc_final": history[-1].get("test_acc"),
        "test_acc_best": best and best["test_acc"],
        "best_epoch": best and best["epoch"],
        "num_test": len(job.held_out[1]) if tested else None,
        "wall_seconds": clock.elapsed() / len(job.runs),  # its share of the time
        "images_per_second": clock.images / clock.seconds,  # of all trials trained together
        "trained_together": len(job.runs),
        "device": f"{job.mesh.size} x {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }
