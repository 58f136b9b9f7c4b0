"""Training from top to bottom: weights and data in, the epochs, a row of results out for each trial."""

import contextlib
import functools
import importlib.metadata
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from rlrr_jax import adapters, checkpoint, distributed, files, methods, optim, plots, report, step
from rlrr_jax import config as config_lib
from rlrr_jax.data import tasks
from rlrr_jax.errors import UserError

CHECK_SECONDS = 3  # between two looks of several processes at whether to stop, in an evaluation
DISPATCH_SECONDS = 10  # a dispatch should last no longer, so that progress and Ctrl-C come through


def splits(run):
    """Which split a run trains on and which it is evaluated on."""
    train, val, both = tasks.get(run.task).parts
    return (train, val) if run.protocol == "tune" else (both, "test")


class Stopped(BaseException):
    """The run was asked to stop, and all that was done is saved. Like Ctrl-C, nothing catches it."""


class Stop:
    """Remembers that the run was asked to stop.

    While trials train, whoever trains them asks and saves first; at any other time nothing can be lost,
    and `ask` raises `Stopped` at once.
    """

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

    Where the trials do not fill the mesh, the last one is trained several times; T counts these, too.

    Attributes:
      runs: fully specified configurations that differ in seed, lr, weight_decay and drop_path.
      crops: the `crops.Crops` that make the images of `data` anew in each epoch, or None.
      lrs: of each trial and step.
      hyper, init_keys: have a leading axis of T trials.
      merge: function `(frozen, trained [T, ...]) -> params [T, ...]`, jitted.
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
    merge: Any

    def steps(self, epoch):
        """Steps of an epoch; `config.total_steps` may end the last one early."""
        before, run = epoch * self.recipe.steps, self.runs[0]
        return min(self.recipe.steps, (run.total_steps or math.inf) - before)


def prepare(runs, load_weights, load_data):
    """Reads weights and data and lays everything on the devices.

    Args:
      runs: the trials, see `Job`.
      load_weights: `(run, model) -> frozen`.
      load_data: `(split, crop=None) -> images, labels`, see `store.load_split` and `load_crops`.
    """
    run = runs[0]
    part, held_out = splits(run)
    images, labels = load_data(part, crop=(run.crop, run.seed) if run.crop else None)
    held_out = load_data(held_out)
    model, method = config_lib.build_model(run), methods.get(run.method, **run.method_kwargs)
    frozen = load_weights(run, model)
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
    mesh = step.make_mesh(jax.devices()[: run.num_devices], len(runs), run.batch_size)
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
    spare = -len(runs) % mesh.shape["trial"]
    keys, hyper = keys + keys[-1:] * spare, hyper + hyper[-1:] * spare
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
        merge=step.map_merge(method, mesh),
    )


def train_together(
    runs,
    folders,
    labels,
    title,
    checkpoints,
    load_weights,
    marks,
    classes,
    load_data,
    tell=lambda clock, epochs: None,
    stop=None,
):
    """Trains one method on one task: a trial, or several at once. Writes each `result.json` last.

    Args:
      runs: the trials, see `Job`.
      folders: folders of the trials' files.
      labels: names of the trials, for their pictures.
      title: name of them together, for the screen.
      checkpoints: folder of the checkpoints.
      load_weights: function `(run, model) -> frozen`.
      marks: `backbone_sha256` and `dataset`, saved with the configuration and the result.
      classes: names of the classes.
      load_data: function `(split, crop=None) -> images, labels`.
      tell: function called after each epoch with the clock and the number of epochs done.
      stop: a `Stop`, asked after each dispatch and while images are evaluated.

    Raises TooLarge if several do not fit into memory, before any step; Stopped if `stop` said so;
    UserError if no trial's loss is finite.
    """
    clock, stop = Clock(), stop or Stop()
    job = prepare(runs, load_weights, load_data)
    recipe, epochs = job.recipe, runs[0].epochs
    before = _machine_before(folders[0])
    for run, folder in zip(runs, folders):
        if distributed.lead():
            files.write_json(
                folder / "config.json", {**run.to_dict(), **marks, "machine": machine(job)}
            )
    with checkpoint.open_manager(checkpoints) as manager:
        pack = functools.partial(step.kept, mesh=job.mesh, number=len(runs))
        keeper = checkpoint.Keeper(manager, runs[0].checkpoint_seconds, pack)
        state, metrics, first, start = _start_or_resume(job, keeper, clock)
        histories = [_history(folder, first) for folder in folders]
        if first or start:
            print(f"{title}: goes on at epoch {first + 1}, step {start}", flush=True)
            if before and before != machine(job):
                print(
                    f"note: it was begun on {_words(before)} and goes on on {_words(machine(job))}: "
                    f"sums are taken in another order, and the last digits differ",
                    flush=True,
                )
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
        row = _result(job, run, trainable, histories[i], marks, clock)
        files.write_json(folder / "result.json", row)
    for i, folder in enumerate(folders if distributed.lead() else ()):  # all results are safe
        plots.save(folder / "curves.png", report.curves, {labels[i]: histories[i]})
    distributed.wait("results")


def machine(job):
    """What decides the order of sums, and so the last bits: devices and, for CPUs, cores."""
    device = jax.devices()[0]
    cores = _cores() if device.platform == "cpu" else None
    return {"devices": job.mesh.size, "kind": device.device_kind, "cores": cores}


def _cores():
    """Cores that this process may use."""
    known = hasattr(os, "sched_getaffinity")  # on Linux
    return len(os.sched_getaffinity(0)) if known else os.cpu_count()


def _machine_before(folder):
    """The `machine` of the start before this one, None if there was none."""
    path = folder / "config.json"
    return files.read_json(path).get("machine") if path.exists() else None


def _words(machine):
    cores = f" ({machine['cores']} cores)" if machine.get("cores") else ""
    return f"{machine.get('devices')} x {machine.get('kind')}{cores}"


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
    like = step.kept(like, job.mesh, len(job.runs))
    if found := keeper.restore(like, len(clock.place(0, 0))):
        state, metrics, place = found
        state, metrics = step.filled((state, metrics), job.mesh, len(job.init_keys))
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
    here = -(-len(job.runs) // groups)
    whole = needs.argument_size_in_bytes + needs.temp_size_in_bytes  # outputs lie in donated arguments
    shared = _bytes((job.frozen, job.data))
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
    cancelled = threading.Event()  # of this training: others use the same crops
    with ThreadPoolExecutor(1) as pool:
        crops = pool.submit(job.crops.epoch, first, cancelled)
        try:
            for epoch in epochs:
                images = crops.result()
                more = epoch + 1 < epochs.stop
                crops = pool.submit(job.crops.epoch, epoch + 1, cancelled) if more else None
                yield epoch, {**job.data, "images": step.put(job.mesh, P(), images)}
        finally:
            cancelled.set()


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

    `check` is called every now and then, in all processes at the same batch.
    """
    run, recipe, mesh = job.runs[0], job.recipe, job.mesh
    last = epoch + 1 == run.epochs
    if not last and (run.protocol in ("fast", "vtab") or epoch == 0):  # the authors skip epoch 0 too
        return [{}] * len(job.runs)
    key = "val" if run.protocol == "tune" else "test"
    eval_step = step.map_eval_step(recipe.model, recipe.image_size, recipe.precision, mesh)
    out = [None] * len(job.init_keys)
    at_once = evaluated_at_once(job, device_memory(jax.local_devices()[0]))
    number = len(job.held_out[1]) * -(-len(job.init_keys) // (at_once * mesh.shape["trial"]))
    bar = tqdm(
        **dict(total=number, unit="img", desc=f"evaluating epoch {epoch + 1}", leave=False, delay=2),
        disable=not distributed.lead(),
    )
    with bar:
        for which, trainable in step.turns(state["trainable"], mesh, at_once):
            params, done = job.merge(job.frozen, trainable), _pace(check, bar)
            found = step.evaluate(eval_step, params, *job.held_out, run.eval_batch_size, mesh, done)
            for i, accuracy, loss in zip(which, found["accuracy"], found["loss"]):
                out[i] = {f"{key}_acc": float(accuracy), f"{key}_loss": _number(loss)}
    return out[: len(job.runs)]


def evaluated_at_once(job, limit):
    """How many trials on each device are evaluated at once: all, or as many as merged trees fit.

    Args:
      limit: bytes of a device; a fifth of what is left beside weights and data is for activations.
    """
    groups = job.mesh.shape["trial"]
    here = len(job.init_keys) // groups
    fit = int(0.8 * (limit - _bytes((job.frozen, job.data))) // _bytes(job.frozen))
    fit = distributed.agree(max(1, min(here, fit)))
    return max(n for n in range(1, fit + 1) if here % n == 0)  # of one size, compiled once


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _pace(check, bar):
    """What is called after each evaluated batch: moves the bar, and checks.

    Among several processes a check is a collective that all wait for, so it comes about every
    `CHECK_SECONDS`, counted in batches that process 0 has timed.
    """
    batches, every, begun = 0, 1, time.monotonic()

    def done(number):
        nonlocal batches, every, begun
        bar.update(number)
        batches += 1
        if batches == 2 and distributed.several():  # the first compiles
            seconds = max(time.monotonic() - begun, 1e-6)
            every = distributed.agree(max(1, int(CHECK_SECONDS / seconds)))
        begun = time.monotonic()
        if batches % every == 0:
            check()

    return done


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
    values = config_lib.described(run, marks)
    plain = {key: value for key, value in run.to_dict().items() if not isinstance(value, dict)}
    where = (*config_lib.PLACES, "recipe")
    return {
        "identity": config_lib.fingerprint([run], marks),
        **config_lib.digests(values),
        **{key: value for key, value in plain.items() if key not in where or key == "trial"},
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
        "resize": run.pretrained.resize,
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
        "cores": machine(job)["cores"],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "config": values,
    }
