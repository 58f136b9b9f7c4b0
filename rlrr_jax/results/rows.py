"""Rows: what one run's `result.json` holds, and rows of the same setting put together."""

import contextlib
import importlib.metadata
import json
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from rlrr_jax import files, methods, metrics
from rlrr_jax.data import tasks
from rlrr_jax.errors import UserError, first_line
from rlrr_jax.recipe import Recipe
from rlrr_jax.runs import identity
from rlrr_jax.runs import workdir as workdir_lib
from rlrr_jax.runtime import memory

COMPARED = ("test_acc_final", "test_acc_best", "val_acc", "train_loss")  # of two results of a run


_NEEDED = {"identity", "config", "setting", "line", *COMPARED}  # by tables


def number(x: Any) -> float | None:
    """A float, None if it is not finite: JSON has no such numbers."""
    return float(x) if math.isfinite(x) else None


def means(recipe: Recipe, sums: dict, trial: int, steps: int | None = None) -> dict[str, Any]:
    """A trial's mean loss and other metrics over the images of an epoch's first steps.

    Args:
      recipe: the `Recipe`.
      sums: values of each trial and step [T, S]: means of the loss, sums of everything else.
      trial: index of the trial.
      steps: number of steps; None is all.

    Returns:
      `{"train_loss", "train_acc", ...}`; None for a value that is not finite.
    """
    steps = steps or recipe.steps
    sizes = np.diff([recipe.images_before(0, i) for i in range(steps + 1)])
    values = {name: np.asarray(x, np.float64)[trial, :steps] for name, x in sums.items()}
    sums = {name: (x * sizes).sum() if name == "loss" else x.sum() for name, x in values.items()}
    return {f"train_{name}": number(x / sizes.sum()) for name, x in sums.items()}


def history(folder: Any, epochs: int) -> list[dict]:
    """The rows of a trial's `metrics.jsonl` up to a number of epochs, which a checkpoint has.

    Raises UserError if some are missing.
    """
    rows = [r for r in files.read_rows(folder / "metrics.jsonl") if r["epoch"] < epochs]
    if len(rows) != epochs:
        raise UserError(
            f"{folder}/metrics.jsonl lacks some of the {epochs} epochs of the checkpoint beside it: "
            f"delete {folder} to start this run again"
        )
    return rows


def result(
    job: Any, run: ConfigDict, end: Any, history: list[dict], provenance: dict, clock: Any
) -> dict:
    """The row of a finished run.

    Args:
      job: the `job.Job` of its group.
      run: its configuration.
      end: its `final.Final`.
      history: rows of its `metrics.jsonl`.
      provenance: `backbone_sha256` and `dataset`.
      clock: the `clock.Clock` of its group.
    """
    values = identity.described(run, provenance)
    plain = {key: value for key, value in run.to_dict().items() if not isinstance(value, dict)}
    where = (*identity.PLACES, "recipe")
    return {
        "identity": identity.fingerprint([run], provenance),
        **identity.digests(values),
        **{key: value for key, value in plain.items() if key not in where or key == "trial"},
        "method_kwargs": run.method_kwargs.to_dict(),
        "loss_kwargs": run.loss_kwargs.to_dict(),
        "options": run.options,
        "val_tried": list(run.get("val_tried") or ()) or None,  # by "vtab"
        "grid": run.grid.to_dict() if "grid" in run else None,  # that "vtab" chose from
        "tried": run.tried.to_dict() if "tried" in run else None,  # with what it went on to beyond
        "init": {**methods.options(run.method), **run.method_kwargs}.get("init"),
        "source": run.data.source,
        "variant": run.data.variant,
        "backbone": run.pretrained.name,
        **provenance,
        "model": run.model.variant,
        "gelu": run.model.gelu,
        "resize": run.pretrained.resize,
        "attention": run.model.attention,
        "trainable_params": methods.trainable_count(end.trained),
        "head_params": methods.head_count(end.trained),
        **_outcome(run, history, end, metrics.KINDS[job.runs[0].task.kind].score),
        **_effort(job, clock),
        "config": values,
    }


def _outcome(run, history, end, score):
    """Loss and scores of a run, and how many images they are of; what is called acc is its `score`."""
    key = f"test_{score}"
    tested = [row for row in history if row.get(key) is not None]
    best = max(tested, key=lambda row: row[key]) if run.protocol == "official" and end.epochs else None
    test, last = end.held_out == "test", history[end.epoch]
    more = {}
    if end.largest is not None:
        more = {"largest_class": end.largest[0], "class_ratio": end.largest[1]}
    return {
        "train_loss": last["train_loss"],
        "val_acc": last.get(f"val_{score}", run.get("val_acc")),  # "vtab": of the chosen trial
        "test_acc_final": end.metrics.get(score) if test else None,
        "test_acc_best": best and best[key],
        "best_epoch": best and best["epoch"],
        "num_test": end.number if test else None,
        "num_val": None if test else end.number,
        "score": score,
        "metrics": end.metrics,
        "kept_epoch": end.epoch if run.keep else None,
        "epochs_trained": end.epochs,
        **end.settled,
        **more,
    }


def _effort(job: Any, clock: Any) -> dict:
    """How long a run of a group took, and on what."""
    return {
        "wall_seconds": clock.elapsed() / len(job.runs),  # its share of the time
        "images_per_second": clock.images / clock.seconds,  # of all trials trained together
        "trained_together": len(job.runs),
        "device": f"{job.mesh.size} x {jax.devices()[0].device_kind}",
        "cores": memory.machine(job.mesh.size)["cores"],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }


def find(workdirs: list, saved: Iterable = ()) -> list[dict]:
    """Rows of all finished runs below workdirs, each once, in the order of tasks.

    Args:
      workdirs: folders.
      saved: files such as `results.json` that have the rows of some.

    Raises UserError if two disagree about one.
    """
    every = [(read(p), p) for w in workdirs for p in files.below(w, "*", "*", "seed*", "result.json")]
    every += [(row, path) for path in saved for row in _saved(path)]
    found: dict[str, tuple[dict, Any]] = {}
    for row, path in every:
        other, where = found.setdefault(row["identity"], (row, path))
        if any(other[key] != row[key] for key in COMPARED):
            raise UserError(
                f"{where} and {path} are results of the same run that differ: leave one out"
            )
    order = {name: i for i, name in enumerate(tasks.TASKS)}
    rank = lambda row: order.get(row["task"], len(order))
    key = lambda row: (rank(row), row["method"], row["seed"], row["identity"])
    return sorted((row for row, _ in found.values()), key=key)


def _saved(path: Any) -> list[dict]:
    """The rows in a file."""
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: name a results.json, or a workdir")
    try:
        rows = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is no JSON ({first_line(e)}): name a results.json") from e
    whole = lambda row: isinstance(row, dict) and row.keys() >= _NEEDED
    if not isinstance(rows, list) or not rows or not all(map(whole, rows)):
        raise UserError(f"{path} is no list of rows that runs wrote: name a results.json")
    return rows


def read(path: Any) -> dict:
    """The row in a `result.json`; UserError for one that lacks what tables are made of."""
    row = files.read_json(path)
    if missing := _NEEDED - row.keys():
        raise UserError(
            f"{path} is damaged (it lacks {', '.join(sorted(missing))}): delete {path.parent} to start "
            f"that run again"
        )
    return row


def unfinished(workdir: Any) -> list[str]:
    """A line for each run that failed; of parts, also for each that none has finished yet."""
    failed = {path.parent for path in files.below(workdir, "*", "*", "seed*", "error.txt")}

    def why(folder: Any) -> str:
        with contextlib.suppress(FileNotFoundError):  # another process finishes it just now
            return (folder / "error.txt").read_text().strip().splitlines()[-1]
        begun = (folder / "config.json").exists() or (folder.parent / "search").exists()
        return "begun" if begun else "not begun"

    every = sorted({*failed, *workdir_lib.read_list(epath.Path(workdir))})
    left = [path for path in every if not (path / "result.json").exists()]
    return [f"not finished: {' '.join(path.parts[-3:])}: {why(path)}" for path in left]


def diverged(row: dict) -> bool:
    """Whether a run's last loss was not finite: its accuracy says nothing."""
    return row["train_loss"] is None


def fold(rows: list[dict]) -> list[list[dict]]:
    """Rows of the same setting, which differ in their seeds, put together: lists of rows."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        key = row["setting"]
        while any(other["seed"] == row["seed"] for other in groups.get(key, ())):
            key += " again"  # two runs of one seed are not two seeds
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def folder(workdir: Any, row: dict) -> Any:
    """The folder of a run, or of a row's."""
    parts = workdir_lib.task_folder, workdir_lib.method_folder, workdir_lib.run_folder
    return workdir.joinpath(*(name(row) for name in parts))
