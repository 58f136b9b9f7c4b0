"""Methods that train nothing, see `methods.Untrained`: features are computed once, and answer."""

from typing import Any

import numpy as np
from scipy import special

from rlrr_jax import answers, metrics
from rlrr_jax.errors import UserError
from rlrr_jax.final import Final
from rlrr_jax.job import Job
from rlrr_jax.results.outputs import Outputs, write_configs, write_results
from rlrr_jax.runtime.clock import Clock
from rlrr_jax.train import Progress

SMALLEST = 1e-6  # of a share, so that its logarithm is finite


def finish(job: Job, outputs: Outputs) -> None:
    """Writes the result of each run of a group; there is no adapter, since nothing was trained.

    Raises UserError where features are not what the head would get, as with random crops.
    """
    run, clock = job.runs[0], Clock(job.begun)
    if job.recipe.image_size is not None:
        raise UserError(
            f"method {run.config.method} needs what the head gets of each image, and this run makes "
            f"others of it: leave out config.crop, config.frozen_dtype and config.loss"
        )
    write_configs(job, outputs)
    bank = _features(job.feed.images), _targets(job, job.feed.labels)
    val, test = job.held_out, job.tested
    how: Any = job.recipe.method.untrained
    known = _features(val[0]), _targets(job, val[1])
    score = metrics.KINDS[run.task.kind].score
    judge = lambda votes: _judged(job, votes, val[1])[score]
    chosen = how.choose(bank, known, judge)
    said = ", ".join(f"{key}={value}" for key, value in chosen.items())
    print(
        f"{run.label}: trains nothing; {said}; class weights, temperature and the best epoch are of no "
        f"use to it"
    )
    first = how.answer(bank, known[0], **chosen)
    own = _judged(job, how.answer(bank, bank[0], same=True, **chosen), job.feed.labels)
    row = {"epoch": 0, "lr": None, **{f"train_{name}": x for name, x in own.items()}}
    row |= {f"val_{name}": x for name, x in _judged(job, first, val[1]).items()}
    name, logits, labels = "val", first, val[1]
    if test is not None:
        both = tuple(np.concatenate(parts) for parts in zip(bank, known))
        name, labels = "test", test[1]
        logits = how.answer(both, _features(test[0]), **chosen)
    found = _judged(job, logits, labels)
    row |= {f"{name}_{key}": x for key, x in found.items()} | {"seconds": clock.elapsed()}
    unequal = metrics.largest(labels, job.classes) if run.task.kind == "class" else None
    nothing: dict = {"adapter": {}, "head": {}}
    end = Final(nothing, 0, 0, name, len(labels), found, {"chosen": chosen}, unequal)
    clock.add(len(job.feed.labels), max(clock.elapsed(), 1e-6))
    progress = Progress(None, None, 0, 0, clock, [[row] for _ in job.runs])
    write_results(job, outputs, progress, [end] * len(job.runs))


def _features(images: Any) -> np.ndarray:
    """What the head gets [N, D], of images that are not flipped."""
    found = np.asarray(images)
    return np.float32(found if found.ndim == 2 else found[:, 0])


def _targets(job: Job, labels: np.ndarray) -> np.ndarray:
    """What neighbours vote for [N, C]."""
    if job.runs[0].task.kind == "class":
        return np.eye(job.classes, dtype=np.float32)[labels]
    return labels if labels.ndim == 2 else labels[:, None]


def _judged(job: Job, votes: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Metrics of mean targets [N, C], which are shares of classes or labels, or values."""
    task = job.runs[0].task
    shares = np.clip(votes, SMALLEST, 1 - SMALLEST)
    logits = {"class": np.log(shares), "labels": special.logit(shares), "value": votes}[task.kind]
    return answers.judged(task, logits, labels)
