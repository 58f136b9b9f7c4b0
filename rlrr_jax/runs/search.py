"""The protocol "vtab": hyper-parameters are chosen from a grid on val200, then trained on 1000.

With `grid.folds` they are chosen on all images that are trained on in the end, in so many parts; with
`grid.extend` a search whose best lies at an end of its grid goes on beyond that.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ml_collections import ConfigDict

from rlrr_jax import answers, checks, files, run_images
from rlrr_jax import config as config_lib
from rlrr_jax.errors import UserError
from rlrr_jax.runs import workdir
from rlrr_jax.runs.workdir import Work

STEPS = 6  # how often a search goes beyond an end of its grid
LIMITS = {"drop_path": 1.0, "weight_decay": 1.0}  # it stays below


class Tried(NamedTuple):
    """A setting of a search, over its folds: what was set, and the means of what its runs gave."""

    values: dict[str, float]
    score: float | None
    accuracy: float | None
    loss: float

    @property
    def rank(self) -> tuple:
        """The best setting has the smallest: ties go to the smaller loss, then to smaller values."""
        assert self.score is not None
        return (-self.score, self.loss, *self.values.values())


def grid(run: ConfigDict) -> dict[str, tuple]:
    """The values that the protocol "vtab" tries of each key."""
    given = {key: tuple(run.grid[key]) for key in checks.GRID}
    for key in checks.searched(run):
        given |= {f"loss_kwargs.{key}": tuple(run.grid[key])} if run.grid[key] else {}
    return given


def settings(run: ConfigDict, changes: Iterable[dict] | None = None) -> list[ConfigDict]:
    """The runs that the protocol "vtab" chooses from, of seed 0, those of a fold together.

    Args:
      run: the run that is to choose.
      changes: settings to try; None are all of the grid.
    """
    if changes is None:
        given = grid(run)
        changes = [dict(zip(given, values)) for values in itertools.product(*given.values())]
    changes, folds = list(changes), run.grid.folds
    whole = run_images.splits(run)[0]
    return [
        _trial(run, change, (whole, i, folds) if folds else None)
        for i in range(folds or 1)
        for change in changes
    ]


def extends(run: ConfigDict) -> bool:
    """Whether the search of a run may go on beyond its grid."""
    return run.protocol == "vtab" and run.grid.extend and max(map(len, grid(run).values())) > 1


def _trial(run: ConfigDict, change: dict, fold: tuple[str, int, int] | None) -> ConfigDict:
    trial = ConfigDict(run.to_dict())
    part = f"fold{fold[1] + 1}of{fold[2]}" if fold else None
    name = "-".join(filter(None, [run.trial, config_lib.trial_name(change), part]))
    trial.update(protocol="tune", seed=0, trial=name, searching=True)
    if fold:
        trial.fold = fold
    trial.update_from_flattened_dict(change)
    del trial.grid
    config_lib.set_epochs(trial)
    return trial


def trials(work: Work, changes: Iterable[dict] | None = None) -> list[Work]:
    """The runs that a run of the protocol "vtab" chooses from, see `settings`."""
    out = []
    for run in settings(work.run, changes):
        folder = work.folder.parent / "search" / workdir.run_folder(run)
        label = f"{run.task} {workdir.method_folder(run)} {workdir.run_folder(run)}"
        out.append(Work(run, folder, work.found, label))
    workdir.keep_heads(out)
    return out


def choose(works: list[Work], train_all: Callable[[list[Work]], list[dict]]) -> list[Work]:
    """Runs of the protocol "vtab" with their hyper-parameters, the best of the search, see `Tried`.

    Others are returned as they are.

    Args:
      works: runs of one setting, which differ in their seeds.
      train_all: function that trains runs together and returns their rows.
    """
    if works[0].run.protocol != "vtab":
        return works
    if before := _chosen_before(works):
        return [work._replace(run=_with(work.run, before)) for work in works]
    first = next((work for work in works if not work.finished), works[0])
    found = _measured(first, None, train_all)
    best = _best(first.run, found)
    for _ in range(STEPS if first.run.grid.extend else 0):
        if not (beyond := _beyond(best, found)):
            break
        _say(first, best, beyond)
        found += _measured(first, [{**best.values, **change} for change in beyond], train_all)
        best = _best(first.run, found)
    tried = {key: tuple(sorted({t.values[key] for t in found})) for key in best.values}
    chosen = {
        **best.values,
        "val_acc": best.accuracy,
        "val_tried": tuple(sorted(t.accuracy for t in found if t.accuracy is not None)),
        "tried": ConfigDict({key.rpartition(".")[2]: values for key, values in tried.items()}),
    }
    return [work._replace(run=_with(work.run, chosen)) for work in works]


def _with(run: ConfigDict, chosen: dict) -> ConfigDict:
    """A run with what a search chose."""
    run = ConfigDict(run.to_dict())
    run.update_from_flattened_dict(chosen)
    return run


def _chosen_before(works: list[Work]) -> dict:
    """What an earlier start chose for these runs, as one of them has it; nothing if none was begun."""
    for work in works:
        if (path := work.folder / "config.json").exists():
            saved = files.read_json(path)
            if saved.get("val_acc") is not None:
                options = {
                    f"loss_kwargs.{key}": x for key, x in (saved.get("loss_kwargs") or {}).items()
                }
                keys = (*checks.GRID, "val_acc", "val_tried", "tried")
                return {**{key: saved[key] for key in keys if key in saved}, **options}
    return {}


def _measured(
    work: Work, changes: list[dict] | None, train_all: Callable[[list[Work]], list[dict]]
) -> list[Tried]:
    """Settings, trained on each fold and measured."""
    rows, works = [], trials(work, changes)
    for _, part in itertools.groupby(works, lambda work: work.run.get("fold")):
        group = list(part)
        with workdir.locked(group):
            rows += train_all(group)
    each = len(rows) // max(work.run.grid.folds, 1)
    keys = grid(work.run)
    out = []
    for i in range(each):
        run, same = works[i].run, rows[i::each]  # one of each fold
        values = {key: run[key] for key in keys}
        task, weights = run_images.task_of(run), run.get("class_weights")
        out.append(Tried(values, *_means(same, answers.chooses(task, weights))))
    return out


def _means(rows: list[dict], score: str) -> tuple[float | None, float | None, float]:
    """Mean score, accuracy and loss of a setting's folds; None, and infinite if one diverged."""
    metrics = [row.get("metrics") or {} for row in rows]
    scores = [m.get(score, row["val_acc"]) for m, row in zip(metrics, rows)]
    accuracies, losses = [row["val_acc"] for row in rows], [m.get("loss") for m in metrics]
    mean = lambda values: None if None in values else sum(values) / len(values)
    if any(row["train_loss"] is None for row in rows):
        return None, None, math.inf
    if None in (*scores, *accuracies):
        return None, None, 0.0
    loss = mean(losses)
    return mean(scores), mean(accuracies), math.inf if loss is None else loss


def _best(run: ConfigDict, found: list[Tried]) -> Tried:
    """The best setting; UserError where none says anything."""
    if known := [tried for tried in found if tried.score is not None]:
        return min(known, key=lambda tried: tried.rank)
    if all(tried.loss == math.inf for tried in found):
        raise UserError(
            f"the loss of {run.task} {run.method} is finite at no setting of config.grid: put smaller "
            f"learning rates into it and choose another --workdir"
        )
    way = "lower config.grid.folds" if run.grid.folds else "config.own.val, or the split val"
    raise UserError(
        f"no image of {run.task} to choose on says anything: give them labels or values that differ "
        f"({way})"
    )


def _beyond(best: Tried, found: list[Tried]) -> list[dict]:
    """For each key whose best value lies at an end of those tried, the next one beyond, by their ratio.

    None beyond 0, or where the next would be one that cannot be.
    """
    out = []
    for key, value in best.values.items():
        tried = sorted({t.values[key] for t in found})
        if len(tried) < 2 or value not in (tried[0], tried[-1]):
            continue
        other = tried[1] if value == tried[0] else tried[-2]
        if not value or not other:
            continue
        beyond = float(f"{value * value / other:.3g}")
        if beyond < LIMITS.get(key, math.inf) and beyond not in tried:
            out.append({key: beyond})
    return out


def _say(work: Work, best: Tried, beyond: list[dict]) -> None:
    of = [f"{key}={best.values[key]:g}" for change in beyond for key in change]
    new = [f"{key}={value:g}" for change in beyond for key, value in change.items()]
    print(
        f"{work.run.task} {workdir.method_folder(work.run)}: the best, {' and '.join(of)}, lies at an "
        f"end of what was tried, so {' and '.join(new)} is tried, too"
    )
