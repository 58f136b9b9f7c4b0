"""What is settled after the last epoch: which trees are kept, what images set aside say, the test."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlrr_jax import answers, evaluate, heads, keeping, metrics, step
from rlrr_jax.job import Job
from rlrr_jax.runtime import distributed


class Final(NamedTuple):
    """What one trial ends with.

    Attributes:
      trained: its trained tree, on the host, its head as a model outside has it, with the
        temperature and the unit of values in it.
      epoch: number of the epoch that it is of.
      epochs: number of epochs that were trained.
      held_out: what the metrics are of: "test" or "val".
      number: of these images.
      metrics: name -> number or None, see `metrics`.
      settled: what images set aside decided: `temperature`, `thresholds`, and `uncalibrated` metrics.
      largest: share of the largest class of these images, and how unequal classes are; None without.
    """

    trained: Any
    epoch: int
    epochs: int
    held_out: str
    number: int
    metrics: dict[str, float | None]
    settled: dict[str, Any]
    largest: tuple[float, float] | None


def settle(job: Job, progress: Any, check: Callable[[], None]) -> list[Final]:
    """The `Final` of each trial of a group.

    Args:
      job: the `Job`.
      progress: the `train.Progress` after the last epoch.
      check: function called every now and then, in all processes after the same batch.
    """
    run, kept = job.runs[0], progress.kept
    trees = step.tuned(progress.state) if kept is None else kept["tree"]
    epochs, lasts = _epochs(progress, len(job.runs))
    ask = lambda what, images: evaluate.trials(job, trees, images, what, check)
    chosen = settled = [{}] * len(job.runs)
    if run.fits:
        chosen = ask("images set aside", job.held_out[0])
        settled = [_fitted(job, logits) for logits in chosen]
    title, held_out = run.held_out, job.held_out
    if job.tested is not None:
        title, held_out = "test", job.tested
        found = [_judged(job, x, held_out[1], s) for x, s in zip(ask("test", held_out[0]), settled)]
    elif run.fits:
        # Judged as before the fit: these images decided it.
        found = [(_judged(job, x, held_out[1], {})[0], s) for x, s in zip(chosen, settled)]
    else:
        rows = [history[epoch] for history, epoch in zip(progress.histories, epochs)]
        found = [(_of_row(row, run.held_out), s) for row, s in zip(rows, settled)]
    trained = distributed.fetch(trees)
    unequal = metrics.largest(held_out[1], job.classes) if run.task.kind == "class" else None
    out = []
    for i, (values, more) in enumerate(found):
        tree = heads.cut(jax.tree.map(lambda x, i=i: x[i], trained), job.classes)
        tree = heads.scaled(tree, more.get("temperature", 1.0), run.task.unit)
        of = title, len(held_out[1]), values, more, unequal
        out.append(Final(tree, int(epochs[i]), int(lasts[i]) + 1, *of))
    return out


def _epochs(progress: Any, trials: int) -> tuple[Any, Any]:
    """The epoch that each trial's tree is of, and the last that it was trained."""
    end = np.full(trials, progress.epoch - 1)
    if progress.kept is None:
        return end, end
    kept = distributed.fetch({key: progress.kept[key] for key in ("epoch", "last")})
    epoch, last = (np.asarray(kept[key])[:trials] for key in ("epoch", "last"))
    pick = lambda x: np.where(x == keeping.NONE, end, x)
    return pick(epoch), pick(last)


def _fitted(job: Job, logits: np.ndarray) -> dict[str, Any]:
    """What the images set aside decide for a trial."""
    run, labels, out = job.runs[0], job.held_out[1], {}
    if not np.isfinite(logits).all():
        return out
    if "temperature" in run.fits:
        out["temperature"] = metrics.fit_temperature(logits, labels)
    if "thresholds" in run.fits:
        out["thresholds"] = metrics.fit_thresholds(logits / out.get("temperature", 1.0), labels)
    return out


def _judged(job: Job, logits: np.ndarray, labels: np.ndarray, settled: dict) -> tuple[dict, dict]:
    """Metrics of a trial's logits, and what was settled with the metrics before that."""
    given = {key: np.array(settled[key]) for key in ("thresholds",) if key in settled}
    task, heat = job.runs[0].task, settled.get("temperature")
    if heat is None:
        return answers.judged(task, logits, labels, **given), settled
    before = answers.judged(task, logits, labels)
    plain = {"uncalibrated": {key: before[key] for key in ("ece", "loss")}}
    return answers.judged(task, logits / heat, labels, **given), {**settled, **plain}


def _of_row(row: dict, held_out: str) -> dict[str, Any]:
    """The metrics of held-out images in a row of `metrics.jsonl`."""
    prefix = f"{held_out}_"
    return {key.removeprefix(prefix): x for key, x in row.items() if key.startswith(prefix)}
