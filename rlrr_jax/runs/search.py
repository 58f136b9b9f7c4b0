"""The protocol "vtab": hyper-parameters are chosen from a grid on val200, then trained on 1000."""

import itertools
from collections.abc import Callable

from ml_collections import ConfigDict

from rlrr_jax import answers, checks, run_images
from rlrr_jax import config as config_lib
from rlrr_jax.errors import UserError
from rlrr_jax.runs import workdir
from rlrr_jax.runs.workdir import Work


def grid(run: ConfigDict) -> dict[str, tuple]:
    """The values that the protocol "vtab" tries of each key."""
    given = {key: tuple(run.grid[key]) for key in checks.GRID}
    for key in checks.searched(run):
        given |= {f"loss_kwargs.{key}": tuple(run.grid[key])} if run.grid[key] else {}
    return given


def settings(run: ConfigDict) -> list[ConfigDict]:
    """The runs that the protocol "vtab" chooses from: the grid on 800 and 200 images, of seed 0."""
    given, out = grid(run), []
    for values in itertools.product(*given.values()):
        change = dict(zip(given, values))
        trial = ConfigDict(run.to_dict())
        name = "-".join(filter(None, [run.trial, config_lib.trial_name(change)]))
        trial.update(protocol="tune", seed=0, trial=name, searching=True)
        for key, value in change.items():
            node, last = checks.group(trial, key)
            node[last] = value
        del trial.grid
        config_lib.set_epochs(trial)
        out.append(trial)
    return out


def trials(work: Work) -> list[Work]:
    """The runs on 800 and 200 images that a run of the protocol "vtab" chooses from; all of seed 0."""
    out = []
    for run in settings(work.run):
        folder = work.folder.parent / "search" / workdir.run_folder(run)
        label = f"{run.task} {workdir.method_folder(run)} {workdir.run_folder(run)}"
        out.append(Work(run, folder, work.found, label))
    workdir.keep_heads(out)
    return out


def choose(works: list[Work], train_all: Callable[[list[Work]], list[dict]]) -> list[Work]:
    """Runs of the protocol "vtab" with their hyper-parameters, the best of the grid on val200.

    Ties go to the smaller learning rate, then weight decay, then drop path. Others are returned as
    they are.

    Args:
      works: runs of one setting, which differ in their seeds.
      train_all: function that trains runs together and returns their rows.
    """
    if works[0].run.protocol != "vtab":
        return works
    search = trials(next((work for work in works if not work.finished), works[0]))
    with workdir.locked(search):
        rows = train_all(search)
    rows = [row for row in rows if row["train_loss"] is not None]  # those that did not diverge
    if not rows:
        raise UserError(
            f"the loss of {works[0].run.task} {works[0].run.method} is finite at no setting of "
            f"config.grid: put smaller learning rates into it and choose another --workdir"
        )
    said = works[0].run.get("class_weights")
    score = answers.chooses(run_images.task_of(works[0].run), said)
    found = lambda row: (row.get("metrics") or {}).get(score, row["val_acc"])
    if not (rows := [row for row in rows if found(row) is not None and row["val_acc"] is not None]):
        raise UserError(
            f"no image of {works[0].run.task} to choose on says anything: give them labels or values "
            f"that differ (config.own.val, or the split val)"
        )
    best = min(rows, key=lambda row: (-found(row), *(row[key] for key in checks.GRID)))
    out = []
    for work in works:
        run = ConfigDict(work.run.to_dict())
        run.update({key: best[key] for key in checks.GRID})
        run.loss_kwargs.update(best.get("loss_kwargs") or {})
        run.val_acc = best["val_acc"]
        run.val_tried = tuple(sorted(row["val_acc"] for row in rows))
        out.append(work._replace(run=run))
    return out
