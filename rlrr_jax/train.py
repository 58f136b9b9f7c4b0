"""The train loop: the epochs of a group of trials, from the start or a checkpoint to the results."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rlrr_jax import answers, evaluate, final, keeping, step
from rlrr_jax.errors import UserError
from rlrr_jax.job import Job
from rlrr_jax.results import logs, rows
from rlrr_jax.results.outputs import Outputs, print_resumed, write_configs, write_metrics, write_results
from rlrr_jax.runtime import checkpoint, distributed
from rlrr_jax.runtime import mesh as mesh_lib
from rlrr_jax.runtime.clock import Clock
from rlrr_jax.runtime.stop import Stop, Stopped


@dataclasses.dataclass
class Progress:
    """How far a group of trials is; the train loop changes it in place.

    Attributes:
      state: trained trees and optimiser states of the trials [T, ...], on the mesh.
      metrics: values of this epoch's steps so far [T, S], see `step.init_metrics`.
      epoch: number of finished epochs.
      step: number of finished steps of the next one.
      clock: time and speed.
      histories: rows of each trial's `metrics.jsonl`.
      kept: the best epoch of each trial so far, see `keeping`, where it is asked for.
    """

    state: Any
    metrics: Any
    epoch: int
    step: int
    clock: Clock
    histories: list[list[dict]]
    kept: Any = None

    @property
    def saved(self) -> Any:
        """What a checkpoint has for the state."""
        return self.state if self.kept is None else {**self.state, "kept": self.kept}


def train(
    job: Job,
    outputs: Outputs,
    stop: Stop | None = None,
    on_epoch: Callable[[Clock, int], None] = lambda clock, epochs: None,
) -> None:
    """Trains one method on one task: a trial, or several at once. Writes each `result.json` last.

    Args:
      job: weights, data and hyper-parameters of the trials.
      outputs: where results go.
      stop: whether to stop, asked after each dispatch and while images are evaluated.
      on_epoch: function called after each epoch with the clock and the number of epochs done.

    Raises:
      memory.TooLarge: if the trials do not fit into memory, before any step.
      Stopped: if `stop` said so, after saving.
      UserError: if no trial's loss is finite.
    """
    clock, stop = Clock(job.begun), stop or Stop()
    before = write_configs(job, outputs)
    with checkpoint.open_manager(outputs.checkpoints) as manager:
        pack = functools.partial(mesh_lib.without_spares, mesh=job.mesh, number=len(job.runs))
        keeper = checkpoint.Keeper(manager, job.runs[0].limits.checkpoint_seconds, stop, pack)
        progress = start_or_resume(job, outputs, keeper, clock)
        if progress.epoch or progress.step:
            print_resumed(outputs, progress, before, job.mesh.size)
        check = functools.partial(keeper.stop_if_asked, progress)
        left = progress.epoch < job.epochs and not keeping.over(progress.kept)
        with stop.training():  # an exception in the middle of compiling would leave it in pieces
            train_steps: Any = job.compile(progress.state, progress.metrics) if left else None
        if distributed.any_of(stop()):  # nothing is unsaved yet
            raise Stopped
        with (
            progress_bar(job, progress, outputs.title) as bar,
            stop.training(),
            logs.open_logs(job.runs[0].limits.log, job, outputs, progress.epoch) as log,
            job.parts(progress.epoch, progress.step) as parts,
        ):
            for epoch, until, data in parts if left else ():
                train_part(job, train_steps, data, until, progress, keeper, bar)
                if until == job.steps(epoch):
                    finish_epoch(job, outputs, progress, evaluate_epoch(job, progress, check))
                    log([history[-1] for history in progress.histories])
                    ended = epoch + 1 == job.epochs or keeping.over(progress.kept)
                    keeper.save_if_due(progress, last=ended)
                    on_epoch(clock, epoch + 1)
                    if ended:
                        break
        ends = final.settle(job, progress, check)
    write_results(job, outputs, progress, ends)


def start_or_resume(job: Job, outputs: Outputs, keeper: checkpoint.Keeper, clock: Clock) -> Progress:
    """The progress to go on from: the newest whole checkpoint's, or the beginning."""
    (state, sums), keep, trials = job.shapes(), job.runs[0].keep, len(job.init_keys)
    if keep:
        kept = mesh_lib.abstract(keeping.map_start(job.mesh), job.mesh, step.tuned(state))
        state = {**state, "kept": kept}
    like = mesh_lib.without_spares((state, sums), job.mesh, len(job.runs))
    found = keeper.restore(like, len(clock.numbers(0, 0)))
    if found is None:
        state, sums = job.start()
        kept = keeping.map_start(job.mesh)(step.tuned(state)) if keep else None
        return Progress(state, sums, 0, 0, clock, [[] for _ in job.runs], kept)
    *tree, numbers = found
    state, sums = mesh_lib.with_spares(tuple(tree), job.mesh, trials)
    epoch, at = clock.resume(list(numbers))
    histories = [rows.history(folder, epoch) for folder in outputs.folders]
    kept = state.pop("kept", None)
    return Progress(state, sums, epoch, at, clock, histories, kept)


def progress_bar(job: Job, progress: Progress, title: str) -> tqdm:
    """A bar over all images of all trials."""
    recipe, many, last = job.recipe, len(job.runs), job.epochs - 1
    total = recipe.images_before(last, job.steps(last)) * many
    done = recipe.images_before(progress.epoch, progress.step) * many
    shown = distributed.is_process_zero()
    return tqdm(total=total, initial=done, unit="img", desc=title, disable=not shown)


def train_part(
    job: Job,
    train_steps: Callable,
    data: dict,
    until: int,
    progress: Progress,
    keeper: checkpoint.Keeper,
    bar: tqdm,
) -> None:
    """Trains up to step `until` of an epoch, in one dispatch where the machine is fast enough."""
    recipe, many, clock = job.recipe, len(job.runs), progress.clock
    while (start := progress.step) < until:
        stop = min(start + distributed.broadcast(clock.steps(recipe.batch_size * many)), until)
        begun = time.perf_counter()
        progress.state, progress.metrics = train_steps(
            data, progress.state, progress.metrics, progress.epoch, start, stop
        )
        jax.block_until_ready(progress.metrics)
        images = many * (recipe.images_before(0, stop) - recipe.images_before(0, start))
        clock.add(images, time.perf_counter() - begun)
        sums = distributed.fetch(progress.metrics)
        check_finite(job, sums["loss"], progress.epoch, start, stop, progress.state["trainable"])
        progress.step = stop
        keeper.stop_if_asked(progress)
        if stop < job.steps(progress.epoch):
            keeper.save_if_due(progress)
        means = rows.means(recipe, sums, 0, stop)  # of the first trial
        shown = {name: means.get(f"train_{name}") or math.nan for name in ("loss", "acc")}
        text = {"epoch": f"{progress.epoch + 1}/{job.epochs}"}
        bar.set_postfix(text | {k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
        bar.update(images)


def check_finite(job: Job, losses: np.ndarray, epoch: int, start: int, stop: int, trained: Any) -> None:
    """UserError if no trial has a finite loss and gradient any more; the last checkpoint stays.

    Of trials that are chosen from any may diverge: it is not chosen, and no reason to end a search.

    Args:
      job: the `Job`.
      losses: loss of each trial and step of this epoch [T, S]; NaN where a gradient was not finite.
      epoch: number of the epoch, from 0.
      start: first step of the chunk.
      stop: step after the last of the chunk.
      trained: the trained trees [T, ...] after the chunk.
    """
    finite = np.isfinite(losses[:, start:stop])
    if finite.all(1).any() or (job.runs[0].held_out == "val" and not job.runs[0].tested):
        return
    step, run = start + int(np.argmin(finite[0])), job.runs[0]
    first = f"is not finite at step {step + 1} of epoch {epoch + 1}"
    if epoch == step == 0:
        leaves = jax.tree_util.tree_leaves_with_path(distributed.fetch(trained))
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        bad = [name(path) for path, x in leaves if not np.isfinite(x[0]).all()]
        where = f" (of {', '.join(bad[:3])})" if bad and stop == 1 else ""
        raise UserError(
            f"the loss of {run.label}, or its gradient{where}, {first}, where no learning "
            f"rate matters: look for square roots, logarithms and divisions of 0 in the method and the "
            f"loss, and for pixels that are not finite"
        )
    raise UserError(
        f"the loss of {run.label}, or its gradient, {first}, learning rate "
        f"{run.lrs[epoch * job.recipe.steps + step]:g}: lower config.lr and choose another "
        f"--workdir; the checkpoint before that is kept"
    )


def evaluate_epoch(job: Job, progress: Progress, check: Callable) -> list[dict]:
    """Held-out metrics of each trial after an epoch; empty where the protocol has none."""
    run, epoch = job.runs[0], progress.epoch
    if not run.evaluated[epoch]:
        return [{}] * len(job.runs)
    title = f"evaluating epoch {epoch + 1}"
    trees, (images, labels) = step.tuned(progress.state), job.held_out
    logits = evaluate.trials(job, trees, images, title, check)
    found = [answers.judged(run.task, each, labels) for each in logits]
    if progress.kept is not None:
        score = answers.chooses(run.task, run.class_weights)
        scores = [values[score] for values in found]
        progress.kept = keeping.update(progress.kept, trees, scores, epoch, run.patience, job.mesh)
    return [{f"{run.held_out}_{name}": x for name, x in values.items()} for values in found]


def finish_epoch(job: Job, outputs: Outputs, progress: Progress, held_out: list[dict]) -> None:
    """Writes the rows of an epoch, and goes on to the next one."""
    epoch, steps = progress.epoch, job.steps(progress.epoch)
    sums, seconds = distributed.fetch(progress.metrics), progress.clock.elapsed()
    for i, history in enumerate(progress.histories):
        lr = job.runs[i].lrs[epoch * job.recipe.steps + steps - 1]
        means = rows.means(job.recipe, sums, i, steps)
        history.append({"epoch": epoch, "lr": lr, **means, **held_out[i], "seconds": seconds})
    write_metrics(outputs, progress.histories)
    progress.metrics = jax.tree.map(jnp.zeros_like, progress.metrics)
    progress.epoch, progress.step = epoch + 1, 0
