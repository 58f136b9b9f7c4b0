"""Tables and the picture of accuracy against cost."""

import statistics
from typing import Any, NamedTuple

import numpy as np

from rlrr_jax.projects.exits import choose
from rlrr_jax.results import plots, tables

TEXT = """\
# Accuracy against cost of early exits: {task}

Cost is the mean number of matmul FLOPs of a test image, in percent of those of the whole network
without exits ({whole:.3g}). The thresholds for a budget were chosen on the validation images, by runs
that were not trained on them. Values after ± are standard deviations over seeds.

{sections}
![accuracy against cost](exits.png)
"""


class Run(NamedTuple):
    """A finished run.

    Attributes:
      row: of its `result.json`.
      plain: FLOPs of its network without exits.
      costs: FLOPs until an image leaves at each exit, and at the end [E + 1].
      direct: the same if all leave there, and no exit before is tried; others than `costs` where each
        exit has a tree of its own.
      alone: accuracy on the test images if all leave at the same exit [E + 1].
      points: a `choose.Point` on the test images for each budget; none without exits.
    """

    row: dict
    plain: float
    costs: np.ndarray
    direct: np.ndarray
    alone: list[float]
    points: list[choose.Point]


def whole(groups: list[list[Run]]) -> float:
    """FLOPs of the whole network without exits."""
    return max(group[0].plain for group in groups)


def name(group: list[Run]) -> str:
    """What tells a group's runs from the others'."""
    return tables.label([run.row for run in group])


def curve(group: list[Run]) -> list[tuple[float, float]]:
    """Means over seeds of (cost, accuracy), for each budget."""
    each = zip(*(run.points for run in group))
    mean = lambda points, key: statistics.mean(getattr(p, key) for p in points)
    return [(mean(points, "cost"), mean(points, "accuracy")) for points in each]


def text(groups: list[list[Run]]) -> str:
    """The text of `exits.md`."""
    full, parts = whole(groups), []
    for group in groups:
        if group[0].points:
            parts.append(_with_exits(group, full))
    plain = [
        [
            name(group),
            f"{100 * group[0].plain / full:.0f} %",
            tables.spread([run.alone[-1] for run in group]),
        ]
        for group in groups
        if not group[0].points
    ]
    if plain:
        table = tables.markdown(["run", "cost", "test accuracy"], plain)
        parts.append(f"## Without exits\n\n{table}\n")
    return TEXT.format(task=groups[0][0].row["task"], whole=full, sections="\n".join(parts))


def _with_exits(group: list[Run], full: float) -> str:
    first, exits = group[0], group[0].row["loss_kwargs"]["at"]
    places = [f"block {number}" for number in exits] + ["end"]
    share = lambda cost: f"{100 * cost / full:.0f} %"
    alone = [
        [place, share(cost), tables.spread([run.alone[i] for run in group])]
        for i, (place, cost) in enumerate(zip(places, first.direct))
    ]
    points, lines = curve(group), []
    mark = choose.knee(points)
    for i, each in enumerate(zip(*(run.points for run in group))):
        left = np.mean([point.shares for point in each], 0)
        lines.append(
            [
                share(choose.budgets(first.costs)[i]),
                _threshold([point.threshold for point in each]),
                share(points[i][0]),
                tables.spread([point.accuracy for point in each]) + " (knee)" * (i == mark),
                *(f"{100 * x:.0f} %" for x in left),
            ]
        )
    head = ["budget", "threshold", "cost", "test accuracy", *(f"left at {p}" for p in places)]
    cost, accuracy = points[mark]
    knee = f"The knee is at {share(cost)} of the cost, with {100 * accuracy:.2f} %."
    return (
        f"## {name(group)}\n\nAll images leave at the same place:\n\n"
        f"{tables.markdown(['place', 'cost', 'test accuracy'], alone)}\n\n"
        f"Each leaves when sure:\n\n{tables.markdown(head, lines)}\n\n{knee}\n"
    )


def _threshold(values: list[float]) -> str:
    """The mean over seeds; "none" where no image leaves early."""
    return "none" if max(values) > 1 else f"{statistics.mean(values):.4f}"


def plain(group: list[Run]) -> dict[str, Any]:
    """A group as JSON has it."""
    seeds = [
        {
            "seed": run.row["seed"],
            "test_acc": run.row["test_acc_final"],
            "alone": run.alone,
            "points": [{**p._asdict(), "shares": p.shares.tolist()} for p in run.points],
        }
        for run in group
    ]
    for seed in seeds:
        for p in seed["points"]:
            p["threshold"] = min(p["threshold"], 2.0)  # JSON has no infinity; none is so sure
    return {"run": name(group), "costs": group[0].costs.tolist(), "seeds": seeds}


def draw(groups: list[list[Run]]) -> bytes:
    """Test accuracy against cost, one line for each group with exits, points for the others."""
    figure, ((axis,),) = plots.subplots()
    full = whole(groups)
    percent = lambda pairs: ([100 * c / full for c, _ in pairs], [100 * a for _, a in pairs])
    lines = [group for group in groups if group[0].points]
    for colour, group in zip(plots.COLOURS, lines):
        axis.plot(*percent(curve(group)), "-o", ms=3, color=colour, label=name(group))
        places = zip(group[0].direct, np.mean([run.alone for run in group], 0))
        axis.plot(*percent(list(places)), "x", color=colour)
    for i, group in enumerate(group for group in groups if not group[0].points):
        at = [(group[0].plain, statistics.mean(run.alone[-1] for run in group))]
        style = dict(color=plots.COLOURS[(len(lines) + i) % 8], label=name(group))
        axis.plot(*percent(at), plots.MARKS[i % 8], ms=8, mfc="none", **style)
    axis.set(xlabel="mean FLOPs of an image [%]", ylabel="test accuracy [%]")
    axis.set_title("crosses: all images leave there", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return plots.png(figure)
