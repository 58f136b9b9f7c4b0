"""Differences between methods on the same tasks and seeds, with confidence intervals."""

import math
import statistics
from typing import NamedTuple

from scipy import special

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
    """

    label: str
    tasks: int
    pairs: int
    mean: float
    half: float | None


def differences(rows: list[dict], against: str) -> list[Difference]:
    """The difference of each line of runs to one of them, in the order of rows.

    The interval is Student's, over the means of tasks where both ran several, else over seeds. It says
    how far other tasks, or other seeds, would move the mean; that of seeds says nothing of other tasks.

    Args:
      rows: rows of `results.json`.
      against: a method, or a whole label, as the table shows it.

    Raises UserError if no line, or more than one, is called so, or if there is nothing to compare.
    """
    lines: dict[str, list[list[dict]]] = {}
    for group in rows_lib.fold([row for row in rows if row["test_acc_final"] is not None]):
        lines.setdefault(_label(group), []).append(group)
    base = _base(list(lines), against)
    first = _accuracies(lines[base])
    out = []
    for label, groups in lines.items():
        mine = _accuracies(groups)
        both = [key for key in mine if key in first]
        if label == base or not both:
            continue
        by_task: dict[str, list[float]] = {}
        for task, seed in both:
            by_task.setdefault(task, []).append(mine[task, seed] - first[task, seed])
        values = [statistics.mean(x) for x in by_task.values()]
        values = values if len(values) > 1 else next(iter(by_task.values()))
        mean, half = statistics.mean(values), interval(values)
        out.append(Difference(label, len(by_task), len(both), mean, half))
    if not out:
        raise UserError(
            f"nothing ran on the tasks and seeds of {against}: give workdirs that share some"
        )
    return out


def interval(values: list[float]) -> float | None:
    """Half the width of Student's confidence interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    quantile = special.stdtrit(len(values) - 1, (1 + LEVEL) / 2)  # of Student's t
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def table(rows: list[dict], against: str) -> str:
    """The differences as a Markdown table."""
    lines = []
    for d in differences(rows, against):
        between = clear = ""
        if d.half is not None:
            between = f"{100 * (d.mean - d.half):+.2f} to {100 * (d.mean + d.half):+.2f}"
            clear = "yes" if abs(d.mean) > d.half else "no"
        lines.append([d.label, f"{100 * d.mean:+.2f}", between, clear, f"{d.tasks}", f"{d.pairs}"])
    head = [f"against {against}", "points", f"{LEVEL:.0%} interval", "clear of 0", "tasks", "pairs"]
    return tables.markdown(head, lines)


def _label(group: list[dict]) -> str:
    return " ".join([group[0]["method"], *tables.which(group[0], seed=False)])


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


def _accuracies(groups: list[list[dict]]) -> dict[tuple[str, int], float]:
    return {(row["task"], row["seed"]): row["test_acc_final"] for group in groups for row in group}
