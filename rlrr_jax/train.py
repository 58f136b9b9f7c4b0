"""One run from top to bottom: weights and data in, the epochs, one row of results out."""

import importlib.metadata
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from rlrr_jax import checkpoint, files, methods, optim, pretrained, report, step
from rlrr_jax import config as config_lib
from rlrr_jax.errors import UserError

DISPATCH_SECONDS = 10  # a dispatch should last no longer, so that progress and Ctrl-C come through


def splits(run):
    """Which split a run trains on and which it is evaluated on."""
    return ("train800", "val200") if run.protocol == "tune" else ("train800val200", "test")


class Job(NamedTuple):
    """All that a run needs and does not change. Arrays are on the mesh."""

    run: Any
    recipe: step.Recipe
    mesh: Any
    frozen: Any
    data: dict
    held_out: tuple
    lrs: list
    hyper: dict
    init_key: Any


def prepare(run, weights, load_data):
    """Reads weights and data and lays everything on the devices.

    Args:
      run: a fully specified configuration, see `config.resolve`.
      weights: path of the pretrained weights.
      load_data: `split -> images, labels`, see `store.load_split`.
    """
    (images, labels), held_out = map(load_data, splits(run))
    model, method = config_lib.build_model(run), methods.get(run.method, **run.method_kwargs)
    frozen = pretrained.load(weights, model=model, image_size=run.image_size, grid=run.pretrained.grid)
    recipe = step.Recipe(
        model=model,
        method=method,
        batch_size=run.batch_size,
        num_images=len(labels),
        image_size=run.image_size,
        flip=run.flip,
        drop_path=run.drop_path > 0,
        precision=run.precision,
    )
    mesh = step.make_mesh(jax.devices()[: run.num_devices])
    init_key, noise_key, order_key = jax.random.split(jax.random.key(run.seed), 3)
    lrs = optim.learning_rates(run.schedule, run.lr, run.epochs)
    hyper = {
        "lr": jnp.array(lrs),
        "weight_decay": jnp.array(run.weight_decay),
        "drop_path": jnp.array(run.drop_path),
        "noise_key": noise_key,
        "order_key": order_key,
    }
    return Job(
        run=run,
        recipe=recipe,
        mesh=mesh,
        frozen=step.put(mesh, P(), frozen),
        data=step.put(mesh, P(), {"images": images[:], "labels": labels}),
        held_out=held_out,
        lrs=lrs,
        hyper=step.put_trial(mesh, hyper),
        init_key=init_key,
    )


def train_one(run, folder, label, weights, marks, load_data, tell=lambda clock, epochs: None):
    """Trains one method on one task with one seed, and writes `result.json` last.

    Args:
      run: a fully specified configuration, see `config.resolve`.
      folder: of its files.
      label: of the run, for the screen.
      weights: path of the pretrained weights.
      marks: `backbone_sha256` and `dataset`, saved with the configuration and the result.
      load_data: `split -> images, labels`.
      tell: called after each epoch with the clock and the number of epochs done.
    """
    clock = Clock()
    job = prepare(run, weights, load_data)
    recipe = job.recipe
    files.write_json(folder / "config.json", {**run.to_dict(), **marks})
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        keeper = checkpoint.Keeper(manager, run.checkpoint_seconds)
        state, metrics, first, start = _start_or_resume(job, keeper, clock)
        history = [r for r in files.read_rows(folder / "metrics.jsonl") if r["epoch"] < first]
        if len(history) != first:
            raise UserError(
                f"{folder}/metrics.jsonl lacks some of the {first} epochs of the checkpoint beside it: "
                f"delete {folder} to start this run again"
            )
        if first or start:
            print(f"{label}: goes on at epoch {first + 1}, step {start}", flush=True)
        train_steps = compile_train_steps(job, state, metrics) if first < run.epochs else None
        total, done = run.epochs * recipe.num_images, recipe.images_before(first, start)
        with tqdm(total=total, initial=done, unit="img", desc=label) as bar:
            for epoch in range(first, run.epochs):
                state, metrics = train_epoch(
                    job, train_steps, state, metrics, epoch, start, keeper, clock, bar
                )
                row = {"epoch": epoch, "lr": job.lrs[epoch], **_means(recipe, metrics)}
                row |= evaluate(job, state, epoch)
                history.append({**row, "seconds": clock.elapsed()})
                files.write_rows(folder / "metrics.jsonl", history)
                metrics, start = jax.tree.map(jnp.zeros_like, metrics), 0
                last = epoch + 1 == run.epochs
                keeper.save_if_due(state, metrics, clock.place(epoch + 1, 0), last)
                tell(clock, epoch + 1)
    trainable = jax.tree.map(lambda x: np.asarray(x[0]), state["trainable"])
    metadata = {"config": run.to_dict(), **marks}
    checkpoint.save_adapter(folder / "adapter.safetensors", trainable, metadata)
    report.curves(folder / "curves.png", {label: history})
    files.write_json(folder / "result.json", _result(job, trainable, history, marks, clock))


class Clock:
    """Time spent on a run over all its starts, and the training speed."""

    def __init__(self):
        self.begun = time.perf_counter()
        self.images, self.seconds = 0, 0.0  # trained, and the time of that alone

    def elapsed(self):
        """Seconds since the run first began, without the time between two starts."""
        return time.perf_counter() - self.begun

    def steps(self, batch_size):
        """Steps that take `DISPATCH_SECONDS`; one as long as the speed is not known."""
        if not self.seconds:
            return 1
        return max(1, int(DISPATCH_SECONDS * self.images / self.seconds / batch_size))

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
    like = step.abstract(begin, job.mesh, job.init_key, job.frozen)
    if found := keeper.restore(like, len(clock.place(0, 0))):
        state, metrics, place = found
        return state, metrics, *clock.resume(place)
    return *begin(job.init_key, job.frozen), 0, 0


def compile_train_steps(job, state, metrics):
    """The program of a whole run, compiled once: `(state, metrics, epoch, start, stop)`."""
    scalar = lambda i: step.put(job.mesh, P(), jnp.int32(i))
    args = (job.frozen, job.data, state, metrics, job.hyper, scalar(0), scalar(0), scalar(0))
    compiled = step.map_train_steps(job.recipe, job.mesh).lower(*args).compile()

    def train_steps(state, metrics, *place):
        return compiled(job.frozen, job.data, state, metrics, job.hyper, *map(scalar, place))

    return train_steps


def train_epoch(job, train_steps, state, metrics, epoch, start, keeper, clock, bar):
    """Steps `start` to the end of an epoch, in one dispatch where the machine is fast enough."""
    recipe = job.recipe
    while start < recipe.steps:
        stop = min(start + clock.steps(recipe.batch_size), recipe.steps)
        begun = time.perf_counter()
        state, metrics = train_steps(state, metrics, epoch, start, stop)
        jax.block_until_ready(metrics)
        images = recipe.images_before(0, stop) - recipe.images_before(0, start)
        clock.seconds += time.perf_counter() - begun
        clock.images += images
        start = stop
        if start < recipe.steps:
            keeper.save_if_due(state, metrics, clock.place(epoch, start))
        means = _means(recipe, metrics, start)
        bar.set_postfix(
            epoch=f"{epoch + 1}/{job.run.epochs}",
            loss=f"{means['train_loss']:.3f}",
            acc=f"{means['train_acc']:.3f}",
            refresh=False,
        )
        bar.update(images)
    return state, metrics


def evaluate(job, state, epoch):
    """Held-out accuracy and loss after an epoch, as the protocol has it; {} where it has none."""
    last, protocol = epoch + 1 == job.run.epochs, job.run.protocol
    if not last and (protocol in ("fast", "vtab") or epoch == 0):  # the authors skip epoch 0 too
        return {}
    key = "val" if protocol == "tune" else "test"
    params = step.map_merge(job.recipe.method.merge, job.mesh)(job.frozen, state["trainable"])
    recipe = job.recipe
    eval_step = step.map_eval_step(recipe.model, recipe.image_size, recipe.precision, job.mesh)
    out = step.evaluate(eval_step, params, *job.held_out, job.run.eval_batch_size, job.mesh)
    return {f"{key}_acc": float(out["accuracy"][0]), f"{key}_loss": float(out["loss"][0])}


def _means(recipe, metrics, steps=None):
    """Mean loss and accuracy over the images of the first `steps` steps of an epoch."""
    steps = steps or recipe.steps
    loss, correct = (np.asarray(metrics[k], np.float64)[0, :steps] for k in ("loss", "correct"))
    sizes = np.diff([recipe.images_before(0, i) for i in range(steps + 1)])
    return {
        "train_loss": float((loss * sizes).sum() / sizes.sum()),
        "train_acc": float(correct.sum() / sizes.sum()),
    }


def _result(job, trainable, history, marks, clock):
    """One row of `results.json`."""
    run = job.run
    tested = [row for row in history if "test_acc" in row]
    best = max(tested, key=lambda row: row["test_acc"]) if run.protocol == "official" else None
    same = ("task", "method", "seed", "lr", "weight_decay", "drop_path", "drop_path_mode")
    same += ("schedule", "flip", "epochs", "batch_size", "protocol", "image_size", "dtype", "precision")
    return {
        "identity": config_lib.fingerprint([run], marks),
        **{key: run[key] for key in same},
        "method_kwargs": run.method_kwargs.to_dict(),
        "init": {**methods.options(run.method), **run.method_kwargs}.get("init"),
        "source": run.data.source,
        "dataset": marks["dataset"],
        "variant": run.data.variant,
        "backbone": run.pretrained.name,
        "backbone_sha256": marks["backbone_sha256"],
        "gelu": run.model.gelu,
        "trainable_params": methods.trainable_count(trainable),
        "head_params": methods.head_count(trainable),
        "train_loss": history[-1]["train_loss"],
        "val_acc": history[-1].get("val_acc", run.get("val_acc")),  # "vtab": of the chosen trial
        "test_acc_final": history[-1].get("test_acc"),
        "test_acc_best": best and best["test_acc"],
        "best_epoch": best and best["epoch"],
        "num_test": len(job.held_out[1]) if tested else None,
        "wall_seconds": clock.elapsed(),
        "images_per_second": clock.images / clock.seconds,
        "device": f"{job.mesh.size} x {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }
