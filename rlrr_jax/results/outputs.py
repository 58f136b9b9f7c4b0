"""The files of a group of trials in its workdir."""

from typing import Any, NamedTuple

import jax
import numpy as np

from rlrr_jax import adapters, cards, files
from rlrr_jax.results import plots, rows
from rlrr_jax.runtime import distributed, memory


class Outputs(NamedTuple):
    """Where the results of a group of trials go, and what is written with them.

    Attributes:
      folders: folder of each trial's files.
      labels: name of each trial, for its picture.
      title: name of them together, for the screen.
      checkpoints: folder of the checkpoints.
      provenance: `backbone_sha256` and `dataset`, saved with configuration and result.
      classes: names of the classes.
    """

    folders: list
    labels: list[str]
    title: str
    checkpoints: Any
    provenance: dict[str, str]
    classes: list[str]


def write_configs(job: Any, outputs: Outputs) -> dict | None:
    """Writes each `config.json`; returns the machine of the start before this one, None if first."""
    path = outputs.folders[0] / "config.json"
    before = files.read_json(path).get("machine") if path.exists() else None
    machine = memory.machine(job.mesh.size)
    for run, folder in zip(job.runs, outputs.folders):
        if distributed.is_process_zero():
            values = {**run.config.to_dict(), **outputs.provenance, "machine": machine}
            files.write_json(folder / "config.json", values)
    return before


def print_resumed(outputs: Outputs, progress: Any, before: dict | None, devices: int) -> None:
    """Prints where a run goes on, and whether on another machine than it was begun on.

    Args:
      outputs: whose title names the run.
      progress: the `train.Progress` of the checkpoint.
      before: machine of the start before this one, see `memory.machine`.
      devices: number of devices of this start.
    """
    where = f"epoch {progress.epoch + 1}, step {progress.step}"
    print(f"{outputs.title}: goes on at {where}")
    if before and before != (machine := memory.machine(devices)):
        print(
            f"note: it was begun on {memory.words(before)} and goes on on {memory.words(machine)}: "
            f"sums are taken in another order, and the last digits differ"
        )


def write_metrics(outputs: Outputs, histories: list[list[dict]]) -> None:
    """Writes each trial's `metrics.jsonl`."""
    for folder, history in zip(outputs.folders, histories):
        if distributed.is_process_zero():
            files.write_rows(folder / "metrics.jsonl", history)


def write_results(job: Any, outputs: Outputs, progress: Any, ends: list) -> None:
    """Writes each trial's adapter and result, then the pictures of their curves.

    Args:
      job: the `job.Job`.
      outputs: where they go.
      progress: the `train.Progress` after the last epoch.
      ends: the `final.Final` of each trial.
    """
    if distributed.is_process_zero():
        for i, (run, folder, end) in enumerate(zip(job.runs, outputs.folders, ends)):
            history = progress.histories[i] = progress.histories[i][: max(1, end.epochs)]
            row = rows.result(job, run.config, end, history, outputs.provenance, progress.clock)
            accuracy = {"train_acc": history[end.epoch].get("train_acc"), "val_acc": row["val_acc"]}
            accuracy["test_acc"] = row["test_acc_final"]
            kind = {"kind": run.task.kind} if run.task.kind != "class" else {}
            answered = {key: x for key, x in {**kind, **end.settled}.items() if key != "uncalibrated"}
            card = cards.card(run.config, outputs.provenance, outputs.classes, accuracy)
            card |= {"answers": answered} if answered else {}
            if run.recipe.method.untrained is not None:
                pass  # there is nothing to keep
            elif all(np.isfinite(x).all() for x in jax.tree.leaves(end.trained)):
                adapters.write(folder / "adapter.safetensors", adapters.Adapter(end.trained, card))
            else:
                print(f"warning: {outputs.labels[i]} diverged: it leaves no adapter")
            files.write_json(folder / "result.json", row)
        write_metrics(outputs, progress.histories)  # without epochs after a trial's end
        shown = zip(outputs.labels, outputs.folders, progress.histories)
        for label, folder, history in shown if ends[0].epochs else ():
            plots.save(folder / "curves.png", plots.curves, {label: history})
    distributed.wait("results")
