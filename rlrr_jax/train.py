"""A run from top to bottom: weights and data in, the epochs, one row of results out."""

import functools
import importlib.metadata
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from rlrr_jax import checkpoint, methods, optim, pretrained, report, step
from rlrr_jax import config as config_lib
from rlrr_jax.data import sources, store, tasks
from rlrr_jax.errors import UserError

DISPATCH_SECONDS = 10  # a dispatch should last no longer, so that progress and Ctrl-C come through


def run(config, workdir=None):
    """Trains and evaluates all runs of a configuration; returns their rows of `results.json`.

    Runs that are finished in the workdir are not repeated; an interrupted one goes on.
    Raises UserError for anything the user can mend, before any work.
    """
    runs = config_lib.resolve(config)
    workdir = epath.Path(workdir or f"runs/{config_lib.fingerprint(runs)}")
    folders = [workdir / r.task / r.method / f"seed{r.seed}" for r in runs]
    weights = {}
    for r in runs:  # before a long download
        for split in splits(r):
            sources.open_split(r.task, tasks.get(r.task), split, r.data.dir)
    for r, folder in zip(runs, folders):
        name = r.pretrained.name
        weights[name] = weights.get(name) or pretrained.fetch(name, r.pretrained.cache_dir)
        _check_folder(folder, r, weights[name][1])
    print(f"workdir: {workdir}", flush=True)

    load_data = functools.lru_cache(2)(_load_data)  # the runs of a task share its images
    rows = []
    for i, (r, folder) in enumerate(zip(runs, folders), 1):
        label = f"[{i}/{len(runs)}] {r.task} {r.method} seed {r.seed}"
        if (folder / "result.json").exists():
            print(f"{label}: finished before", flush=True)
        else:
            path, sha256 = weights[r.pretrained.name]
            train_one(prepare(r, path, load_data), folder, label, sha256)
        rows.append(json.loads((folder / "result.json").read_text()))
    report.collect(workdir)
    histories = [report.read_rows(folder / "metrics.jsonl") for folder in folders]
    names = [f"{r.task} {r.method}" + f" seed {r.seed}" * (r.seed > 0) for r in runs]
    report.curves(workdir / "curves.png", dict(zip(names, histories)))
    return rows


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
    state: dict
    metrics: dict


def prepare(run, weights, load_data):
    """Reads weights and data and lays everything on the devices.

    Args:
      run: a fully specified configuration, see `config.resolve`.
      weights: path of the pretrained weights.
      load_data: `(task, split, image_size, data_dir) -> images, labels`.
    """
    (images, labels), held_out = (
        load_data(run.task, split, run.image_size, run.data.dir) for split in splits(run)
    )
    model, method = config_lib.build_model(run), methods.get(run.method, **run.method_kwargs)
    frozen = pretrained.load(weights, model=model, image_size=run.image_size, grid=run.pretrained.grid)
    recipe = step.Recipe(
        model=model,
        method=method,
        batch_size=run.batch_size,
        num_images=len(labels),
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
    frozen = step.put(mesh, P(), frozen)
    state = step.init_state(recipe, init_key, frozen)
    return Job(
        run=run,
        recipe=recipe,
        mesh=mesh,
        frozen=frozen,
        data=step.put(mesh, P(), {"images": images, "labels": labels}),
        held_out=held_out,
        lrs=lrs,
        hyper=step.put_trial(mesh, hyper),
        state=step.put_trial(mesh, state),
        metrics=step.put_trial(mesh, step.init_metrics(recipe)),
    )


def train_one(job, folder, label, sha256):
    """Trains one method on one task with one seed, and writes `result.json` last."""
    begun, pace = time.perf_counter(), Pace()
    run, recipe = job.run, job.recipe
    report.write_json(folder / "config.json", _saved_config(run, sha256))
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        keeper = checkpoint.Keeper(manager, run.checkpoint_seconds)
        state, metrics, first, start = keeper.restore(job.state, job.metrics)
        history = [r for r in report.read_rows(folder / "metrics.jsonl") if r["epoch"] < first]
        if len(history) != first:
            raise UserError(
                f"{folder}/metrics.jsonl lacks some of the {first} epochs of the checkpoint beside it: "
                f"delete {folder} to start this run again"
            )
        earlier = history[-1]["seconds"] if history else 0.0
        if first or start:
            print(f"{label}: goes on at epoch {first + 1}, step {start}", flush=True)
        train_steps = step.compile_train_steps(job)
        total, done = run.epochs * recipe.num_images, recipe.images_before(first, start)
        with tqdm(total=total, initial=done, unit="img", desc=label) as bar:
            for epoch in range(first, run.epochs):
                state, metrics = train_epoch(
                    job, train_steps, state, metrics, epoch, start, keeper, pace, bar
                )
                row = {"epoch": epoch, "lr": job.lrs[epoch], **_means(job, metrics)}
                row |= evaluate(job, state, epoch)
                row["seconds"] = earlier + time.perf_counter() - begun
                history.append(row)
                report.write_rows(folder / "metrics.jsonl", history)
                metrics, start = jax.tree.map(jnp.zeros_like, metrics), 0
                keeper.save_if_due(state, metrics, epoch + 1, 0, last=epoch + 1 == run.epochs)
    trainable = jax.tree.map(lambda x: np.asarray(x[0]), state["trainable"])
    metadata = {"config": run.to_dict(), "backbone_sha256": sha256}
    checkpoint.save_adapter(folder / "adapter.safetensors", trainable, metadata)
    report.curves(folder / "curves.png", {label: history})
    report.write_json(folder / "result.json", _result(job, trainable, history, sha256, pace))


class Pace:
    """Training speed, measured: for the report, and to choose how many steps a dispatch takes."""

    images = 0
    seconds = 0.0

    def steps(self, batch_size):
        """Steps that take `DISPATCH_SECONDS`; one as long as the speed is not known."""
        if not self.seconds:
            return 1
        return max(1, int(DISPATCH_SECONDS * self.images / self.seconds / batch_size))


def train_epoch(job, train_steps, state, metrics, epoch, start, keeper, pace, bar):
    """Steps `start` to the end of an epoch, in one dispatch where the machine is fast enough."""
    recipe, scalar = job.recipe, lambda i: step.put(job.mesh, P(), jnp.int32(i))
    while start < recipe.steps:
        stop = min(start + pace.steps(recipe.batch_size), recipe.steps)
        clock = time.perf_counter()
        state, metrics = train_steps(
            job.frozen,
            job.data,
            state,
            metrics,
            job.hyper,
            scalar(epoch),
            scalar(start),
            scalar(stop),
        )
        jax.block_until_ready(metrics)
        images = recipe.images_before(0, stop) - recipe.images_before(0, start)
        pace.seconds += time.perf_counter() - clock
        pace.images += images
        start = stop
        if start < recipe.steps:
            keeper.save_if_due(state, metrics, epoch, start)
        means = _means(job, metrics, start)
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
    if not last and (protocol == "fast" or epoch == 0):  # the authors skip the first epoch too
        return {}
    key = "val" if protocol == "tune" else "test"
    params = step.map_merge(job.recipe.method.merge, job.mesh)(job.frozen, state["trainable"])
    eval_step = step.map_eval_step(job.recipe.model, job.run.precision, job.mesh)
    out = step.evaluate(eval_step, params, *job.held_out, job.run.eval_batch_size, job.mesh)
    return {f"{key}_acc": float(out["accuracy"][0]), f"{key}_loss": float(out["loss"][0])}


def _means(job, metrics, steps=None):
    """Mean loss and accuracy over the images of the first `steps` steps of an epoch."""
    steps = steps or job.recipe.steps
    loss, correct = (np.asarray(metrics[k], np.float64)[0, :steps] for k in ("loss", "correct"))
    sizes = np.diff([job.recipe.images_before(0, i) for i in range(steps + 1)])
    return {
        "train_loss": float((loss * sizes).sum() / sizes.sum()),
        "train_acc": float(correct.sum() / sizes.sum()),
    }


def _result(job, trainable, history, sha256, pace):
    """One row of `results.json`."""
    run = job.run
    tested = [row for row in history if "test_acc" in row]
    best = max(tested, key=lambda row: row["test_acc"]) if run.protocol == "official" else None
    same = ("task", "method", "seed", "lr", "weight_decay", "drop_path", "drop_path_mode")
    same += ("epochs", "batch_size", "protocol", "image_size", "dtype", "precision")
    return {
        **{key: run[key] for key in same},
        "method_kwargs": run.method_kwargs.to_dict(),
        "init": {**methods.options(run.method), **run.method_kwargs}.get("init"),
        "source": tasks.get(run.task).source,
        "variant": "original",
        "backbone": run.pretrained.name,
        "backbone_sha256": sha256,
        "gelu": run.model.gelu,
        "trainable_params": methods.trainable_count(trainable),
        "head_params": methods.head_count(trainable),
        "train_loss": history[-1]["train_loss"],
        "val_acc": history[-1].get("val_acc"),
        "test_acc_final": history[-1].get("test_acc"),
        "test_acc_best": best and best["test_acc"],
        "best_epoch": best and best["epoch"],
        "num_test": len(job.held_out[1]) if tested else None,
        "wall_seconds": history[-1]["seconds"],
        "images_per_second": pace.images / pace.seconds if pace.images else None,
        "device": f"{job.mesh.size} x {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }


def _load_data(task, split, image_size, data_dir):
    return store.load_split(task, tasks.get(task), split, image_size, data_dir)


def _check_folder(folder, run, sha256):
    """Makes a run's folder; UserError if another run is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if not path.exists():
        return
    old, new = (
        config_lib.identity(ml_collections.ConfigDict(c))
        for c in (json.loads(path.read_text()), _saved_config(run, sha256))
    )
    if changed := config_lib.differences(old, new):
        raise UserError(
            f"{folder} holds a run with {', '.join(changed)}: choose another --workdir, or delete "
            f"that folder"
        )


def _saved_config(run, sha256):
    return {**run.to_dict(), "backbone_sha256": sha256}
