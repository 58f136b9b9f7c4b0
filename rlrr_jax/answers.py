"""What a configuration says of answers: weights of classes, the epoch that is kept, a temperature."""

import csv
import json
import math
import unicodedata
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlrr_jax import files, losses, methods, metrics
from rlrr_jax.data.task import Task
from rlrr_jax.errors import UserError, nearest

BALANCED, BEST = "balanced", "best"  # values of class_weights and keep


def check(run: ConfigDict, task: Task) -> None:
    """UserError where what is asked of answers does not go with the labels, or with the protocol.

    Fills in what goes without saying: patience keeps the best epoch, and a file of weights is read.
    """
    if task.kind not in (kinds := losses.find(run.loss).kinds):
        what = {"class": "one class an image", "labels": "several labels an image", "value": "values"}
        fitting = [name for name in ("cross_entropy", "binary", "squared", "huber")]
        fitting = [name for name in fitting if task.kind in losses.find(name).kinds]
        raise UserError(
            f"{run.task} has {what[task.kind]}, and the loss {run.loss} learns "
            f"{' or '.join(what[kind] for kind in kinds)}: take config.loss={' or '.join(fitting)}"
        )
    if task.kind == "value":
        for key in ("mixup", "cutmix", "label_smoothing", "class_weights", "temperature"):
            if run[key]:
                raise UserError(f"config.{key} is for classes, and {run.task} has values: leave it out")
    if methods.get(run.method).untrained is not None:
        for key in ("crop", "mixup", "cutmix", "shard_weights"):
            if run[key]:
                raise UserError(f"method {run.method} takes each image once: leave config.{key} out")
        run.update(keep=None, patience=None, temperature=None, class_weights=None, drop_path=0.0)
        return
    if run.temperature and losses.find(run.loss).init is not None:
        raise UserError(
            f"config.temperature is of the head, and the loss {run.loss} trains values beside it: "
            f"leave it out"
        )
    if run.patience is not None and run.keep is None:
        run.keep = BEST
    if run.class_weights not in (None, BALANCED):
        run.class_weights = _given(run.class_weights, _names(task))
    of = [f"config.{key}={run[key]}" for key in ("keep", "temperature") if run[key]]
    if task.kind == "labels":
        of.append("thresholds of labels")
    if run.protocol == "official" and of:
        raise UserError(
            f"config.protocol=official tests after each epoch, and {of[0]} is chosen on images set "
            f"aside: take config.protocol=fast or vtab"
        )


def _names(task: Task) -> list[str]:
    return list(task.names) or [str(i) for i in range(task.classes)]


def _given(text: str, names: list[str]) -> str:
    """Weights of classes as JSON, from a file with the columns class,weight, or as JSON already."""
    if text.lstrip().startswith("{"):
        where, values = "config.class_weights", _parsed(text)
    else:
        path = files.local(text)
        if not path.is_file():
            raise UserError(
                f"config.class_weights={text} is neither {BALANCED} nor a file: name a .csv with the "
                f"columns class,weight"
            )
        where, values = str(path), _table(path)
    if unknown := [name for name in values if name not in names]:
        hint = nearest(unknown[0], names)
        raise UserError(f"{where} has a weight of {unknown[0]!r}, which is no class: {hint}")
    if missing := [name for name in names if name not in values]:
        raise UserError(f"{where} has no weight of {missing[0]!r}: give one of each class")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{where}: the weight {value} of {name!r} must be finite and not negative")
    if not any(values.values()):
        raise UserError(f"{where} has only weights of 0: give one that is larger")
    return json.dumps({name: float(values[name]) for name in names})


def _parsed(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as e:
        raise UserError(f"config.class_weights={text} is no JSON object: name a .csv instead") from e


def _table(path: Any) -> dict[str, Any]:
    """Class -> weight of a file with these columns."""
    try:
        rows = list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} is no CSV in UTF-8 ({e}): name a .csv with class,weight") from e
    if not rows or not {"class", "weight"} <= {*rows[0]}:
        raise UserError(f"{path} has no header class,weight and lines under it: add them")
    out: dict[str, Any] = {}
    for line, row in enumerate(rows, 2):
        name = unicodedata.normalize("NFC", (row["class"] or "").strip())
        if name in out:
            raise UserError(f"{path}:{line}: {name!r} has a weight already: keep one")
        try:
            out[name] = float(row["weight"] or "")
        except ValueError as e:
            raise UserError(
                f"{path}:{line}: the weight {row['weight']!r} is no number: correct it"
            ) from e
    return out


def class_weights(said: str | None, labels: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    """What `losses.weighted` gets for a run's `class_weights` with these labels; nothing for None."""
    if said is None:
        return {}
    if said == BALANCED:
        weights = losses.balanced(labels, task.classes)
    else:
        given = json.loads(said)
        weights = np.array([given[name] for name in _names(task)])
    return {"class_weights": weights.astype(np.float32)}


def chooses(task: Task, class_weights: str | None) -> str:
    """Which metric keeps an epoch: the task's score, with balanced classes their mean accuracy."""
    if class_weights == BALANCED and task.kind == "class":
        return "balanced_acc"
    return metrics.KINDS[task.kind].score


def judged(task: Task, logits: np.ndarray, labels: np.ndarray, **options: Any) -> dict[str, Any]:
    """`metrics` of logits [N, C], of values in their own unit; None for what is not finite."""
    deviation, mean = task.unit
    if task.kind == "value":
        logits, labels = (np.float64(x) * deviation + mean for x in (logits, labels))
    with np.errstate(all="ignore"):
        found = metrics.KINDS[task.kind].measure(logits, labels, **options)
    return {name: float(x) if math.isfinite(x) else None for name, x in found.items()}
