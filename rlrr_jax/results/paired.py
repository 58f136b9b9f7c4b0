"""Differences between methods on the same tasks and seeds, with confidence intervals."""

import math
import statistics
from typing import NamedTuple

from scipy import special

from rlrr_jax.checks import GRID
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.results import rows as rows_lib
from rlrr_jax.results import tables

LEVEL = 0.95


class Difference(NamedTuple):
    """How much better a line of runs is than another, on what both ran.

    Attributes:
      label: what the line is called.
      tasks: number of tasks that both ran.
      pairs: number of pairs of runs of the same task and seed.
      mean: mean difference of the test accuracies, of the tasks' means where there are several.
      half: half the width of the confidence interval of the mean; None for a single value.
      other: settings besides the method in which the runs differ, too.
    """

    label: str
    tasks: int
    pairs: int
    mean: float
    half: float | None
    other: tuple[str, ...] = ()


# What a method brings; any other setting that differs is named.
_OF_METHODS: tuple[str, ...] = (
    *("method", "loss", "grid.", "options", "trial", "schedule", "restarts", "average", *GRID),
    *("mixup", "cutmix", "label_smoothing", "gradients", "val_acc", "val_tried", "tried"),
)


def differences(rows: list[dict], against: str) -> list[Difference]:
    """The difference of each line of runs to one of them, in the order of rows.

    The interval is Student's, over the means of tasks where both ran several, else over seeds. It says
    how far other tasks, or other seeds, would move the mean; that of seeds says nothing of other tasks.

    Args:
      rows: rows of `results.json`.
      against: a method, or a whole label, as the table shows it.

    Raises UserError if no line, or more than one, is called so, if two runs of a line share task and
    seed, or if there is nothing to compare.
    """
    groups = rows_lib.fold(
        [row for row in rows if row["test_acc_final"] is not None and not rows_lib.diverged(row)]
    )
    lines: dict[str, dict[str, list[dict]]] = {}
    for label, group in zip(tables.labels(groups, seed=False), groups):
        task = group[0]["task"]
        if lines.setdefault(label, {}).setdefault(task, group) is not group:
            raise UserError(
                f"two different runs of {task} {label} have the same seed: report their workdirs apart"
            )
    base = _base(list(lines), against)
    first, out = lines[base], []
    for label, mine in lines.items():
        pairs = {task: _pairs(mine[task], first[task]) for task in mine if task in first}
        by_task = {task: values for task, values in pairs.items() if values}
        if label == base or not by_task:
            continue
        values = [statistics.mean(x) for x in by_task.values()]
        values = values if len(values) > 1 else next(iter(by_task.values()))
        number = sum(map(len, by_task.values()))
        other = dict.fromkeys(key for task in by_task for key in _others(mine[task], first[task]))
        mean, half = statistics.mean(values), interval(values)
        out.append(Difference(label, len(by_task), number, mean, half, tuple(other)))
    if not out:
        raise UserError(
            f"nothing ran on the tasks and seeds of {against}: give workdirs that share some"
        )
    return out


def _pairs(mine: list[dict], first: list[dict]) -> list[float]:
    """Differences of the accuracies of the same seeds, of runs that were tested and did not diverge."""
    of = lambda rows: {
        row["seed"]: row["test_acc_final"]
        for row in rows
        if row["test_acc_final"] is not None and not rows_lib.diverged(row)
    }
    base = of(first)
    return [value - base[seed] for seed, value in of(mine).items() if seed in base]


def _others(mine: list[dict], first: list[dict]) -> list[str]:
    """Names of the settings that two groups of a task do not share, besides their methods'."""
    one, two = tables.settings(mine[0]), tables.settings(first[0])
    return [
        key
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key) and not key.startswith(_OF_METHODS)
    ]


def interval(values: list[float]) -> float | None:
    """Half the width of Student's confidence interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    quantile = special.stdtrit(len(values) - 1, (1 + LEVEL) / 2)  # of Student's t
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def table(rows: list[dict], against: str) -> str:
    """The differences as a Markdown table; UserError for tasks whose scores have no mean."""
    scores = {row.get("score") or "acc" for row in rows}
    if len(scores) > 1:
        raise UserError(
            f"the tasks have several scores ({', '.join(sorted(scores))}), whose differences have no "
            f"mean: report those of one"
        )
    found, lines = differences(rows, against), []
    for d in found:
        between = clear = ""
        if d.half is not None:
            between = f"{100 * (d.mean - d.half):+.2f} to {100 * (d.mean + d.half):+.2f}"
            clear = "yes" if abs(d.mean) > d.half else "no"
        lines.append([d.label, f"{100 * d.mean:+.2f}", between, clear, f"{d.tasks}", f"{d.pairs}"])
        lines[-1].append(", ".join(d.other))
    head = [
        f"against {against}",
        "points" if scores != {"r2"} else "R² x 100",
        f"{LEVEL:.0%} interval",
        "clear of 0",
        "tasks",
        "pairs",
    ]
    head.append("differ in, too")
    if not any(d.other for d in found):
        head, lines = head[:-1], [line[:-1] for line in lines]
    return tables.markdown(head, lines)


def by_task(rows: list[dict], against: str) -> str:
    """A Markdown table with a line for each method and, of each task, its score and the difference.

    A task that the line compared to did not run, or ran in several ways, has scores alone.

    Args:
      rows: rows of `results.json`.
      against: a method, or a whole label, as in `differences`.
    """
    names = list(dict.fromkeys(row["task"] for row in rows))
    cells: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        groups = rows_lib.fold([row for row in rows if row["task"] == name])
        lines = dict(zip(tables.labels(groups, seed=False), groups))
        called = [x for x in lines if x == against] or [x for x in lines if x.split(" ")[0] == against]
        for label, group in lines.items():
            first = [label, f"{group[0]['trainable_params']:,}"]
            line = cells.setdefault(label, first + [""] * 2 * len(names))
            line[2 + 2 * i] = tables.accuracy(group)
            if len(called) == 1 and label != called[0]:
                line[3 + 2 * i] = _between(_pairs(group, lines[called[0]]))
    head = [
        "method",
        "params",
        *(text for name in names for text in (name, f"{name} against {against}")),
    ]
    return tables.markdown(head, list(cells.values()))


def _between(values: list[float]) -> str:
    """`"+0.60 (+0.21 to +0.99)"`: the mean of differences in points with its interval; "" for none."""
    if not values:
        return ""
    mean, half = statistics.mean(values), interval(values)
    text = f"{100 * mean:+.2f}"
    if half is None:
        return text
    return f"{text} ({100 * (mean - half):+.2f} to {100 * (mean + half):+.2f})"


def _base(labels: list[str], against: str) -> str:
    if against in labels:
        return against
    named = [label for label in labels if label.split(" ")[0] == against]
    if len(named) > 1:
        raise UserError(
            f"{against} is there in several ways: name one of {', '.join(map(repr, named))}"
        )
    if not named:
        raise unknown("line", against, labels)
    return named[0]
