"""The table of VTAB-1k: tasks in columns, means over groups, seeds folded, beside published rows."""

import csv as csv_lib
import functools
import io
import pathlib
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from tabulate import tabulate

from rlrr_jax.data import tasks
from rlrr_jax.errors import UserError
from rlrr_jax.results import plots, tables
from rlrr_jax.results import rows as rows_lib
from rlrr_jax.runs import identity

PUBLISHED = pathlib.Path(__file__).parent / "published.csv"
SHORT = dict(
    zip(
        tasks.VTAB,
        (
            *("cifar", "caltec", "dtd", "flower", "pets", "svhn", "sun397"),
            *("camely", "eurosa", "resisc", "retino"),
            *("cl-cnt", "cl-dst", "dmlab", "kitti", "ds-loc", "ds-ori", "no-azi", "no-ele"),
        ),
    )
)
MEANS = {
    "natural": "natur.",
    "specialized": "speci.",
    "structured": "struc.",
    "mean_of_groups": "groups",
    "flat_mean": "flat",
}
CAPTION = """\
Test accuracy in percent, mean and standard deviation (n - 1) over seeds. groups: the mean of the
three group means, as most papers report it; flat: the mean of the 19 tasks, as the RLRR paper does.
A mean is left out where a task is missing. params: trained values without the head; head: its mean
over tasks. Published rows are copied from their sources (results/published.csv); RLRR's are the best
epoch's test accuracy on images saved again as JPEG, and their parameters include heads."""
_SHOWN = ("Full fine-tuning", "Linear probing", "LoRA", "SSF", "RLRR (ViT-B/16)")
_SWIN = ("Full fine-tuning (Swin-B)", "Linear probing (Swin-B)", "ARC (Swin-B)", "RLRR (Swin-B)")
_MORE = {
    "augreg": "RLRR* (ViT-B/16 AugReg)",
    "ViT-L_16": "RLRR (ViT-L/16)",
    "ViT-H_14": "RLRR (ViT-H/14)",
}


class Line(NamedTuple):
    """A line of the table.

    Attributes:
      label: name of the method and its options.
      protocol, pixels: as in the rows; empty for published lines.
      cells: task or mean -> (mean, standard deviation or None), fractions.
      params, head: numbers of trained values, as text.
      seeds: seeds that were run.
      counts: how many of them each task has: "3", or "2 to 3".
      source: where a published line was printed, else "".
      settings: the values that the runs share.
    """

    label: str
    protocol: str
    pixels: str
    cells: dict
    params: str
    head: str
    seeds: tuple
    counts: str
    source: str
    settings: dict


def lines(rows: list[dict]) -> list[Line]:
    """The lines for the VTAB rows of `results.json`, then all published ones; [] without such rows.

    Raises UserError if two rows have task, seed and settings in common but not the rest.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        tested = row["test_acc_final"] is not None and not rows_lib.diverged(row)
        if row["task"] in tasks.VTAB and tested:
            groups.setdefault(row["line"], []).append(row)
    ours = []
    for group in groups.values():
        ours.append(_line(group, "test_acc_final", ""))
        if group[0]["protocol"] == "official":
            ours.append(_line(group, "test_acc_best", ", best epoch"))
    return ours and _tell_apart(ours) + published()


def _tell_apart(ours):
    """Lines with what tells them apart in their labels, where the table has no column for it."""
    shown = ("method", "method_kwargs.", "protocol", "data.source", "data.variant", "grid.")
    every = dict.fromkeys(key for line in ours for key in line.settings)
    hidden = [key for key in every if not key.startswith(shown)]
    differ = [k for k in hidden if len({str(line.settings.get(k)) for line in ours}) > 1]
    if "pretrained.name" in differ and "backbone_sha256" in differ:
        differ.remove("backbone_sha256")

    def note(line):
        values = {key: line.settings[key] for key in differ if key in line.settings}
        return "".join(f", {key.rpartition('.')[2]}={str(v)[-40:]}" for key, v in values.items())

    return [line._replace(label=line.label + note(line)) for line in ours]


def by_task(rows: list[dict], key: str) -> dict[str, dict[int, float]]:
    """What rows of one line have under a key, by task and seed.

    Raises UserError if two rows have task and seed in common, or if those of a task differ in more.
    """
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        seeds = values.setdefault(row["task"], {})
        if row["seed"] in seeds:
            raise UserError(
                f"two different runs of {row['task']} {row['method']} seed {row['seed']} are to be put "
                f"into one line of the table: report their workdirs apart"
            )
        seeds[row["seed"]] = row[key]
    _check_alike(rows)
    return values


def _line(rows, key, suffix):
    values = by_task(rows, key)
    counts = [len(seeds) for seeds in values.values()]
    first = rows[0]
    options = [f"{k}={v}" for k, v in first["method_kwargs"].items()]
    options += tables.changed(first)
    head = np.mean([row["head_params"] for row in {r["task"]: r for r in rows}.values()])
    return Line(
        label=" ".join([first["method"], *options]) + suffix,
        protocol=first["protocol"],
        pixels=f"{first['source']} {first['variant']}",
        cells=_cells(values),
        params=f"{first['trainable_params']:,}",
        head=f"{head:,.0f}",
        seeds=tuple(sorted({row["seed"] for row in rows})),
        counts=" to ".join(map(str, sorted({min(counts), max(counts)}))),
        source="",
        settings=flatten_dict(identity.across_tasks(first["config"]), sep="."),
    )


def _check_alike(rows):
    """UserError if runs of a task differ in more than the seed, and what was searched."""
    first = {}
    for row in rows:
        other = first.setdefault(row["task"], row)
        if row["setting"] != other["setting"]:
            both = (identity.setting(r["config"]) for r in (other, row))
            raise UserError(
                f"runs of {row['task']} {row['method']} are to be averaged over seeds but differ in "
                f"{', '.join(identity.differences(*both))}: report their workdirs apart"
            )


def _cells(values):
    """Cells of tasks, groups and means from task -> seed -> accuracy."""
    over = {task: functools.partial(_mean, (task,)) for task in tasks.VTAB if task in values}
    groups = {g: names for g, names in tasks.GROUPS.items() if set(names) <= set(values)}
    over |= {group: functools.partial(_mean, names) for group, names in groups.items()}
    if len(groups) == len(tasks.GROUPS):
        per_group = lambda value: np.mean([_mean(names, value) for names in groups.values()])
        over |= {"mean_of_groups": per_group, "flat_mean": functools.partial(_mean, tuple(tasks.VTAB))}
    return {name: _spread(values, mean, name) for name, mean in over.items()}


def _mean(names, value):
    return np.mean([value(name) for name in names])


def _spread(values, mean, name):
    """Mean over seeds and its deviation, where every task of it has the same seeds."""
    needed = tasks.GROUPS.get(name) or ((name,) if name in tasks.VTAB else tuple(tasks.VTAB))
    seeds = [set(values[task]) for task in needed]
    center = mean(lambda task: np.mean(list(values[task].values())))
    if len(seeds[0]) < 2 or any(s != seeds[0] for s in seeds):
        return float(center), None
    each = [mean(lambda task, seed=seed: values[task][seed]) for seed in seeds[0]]
    return float(center), float(np.std(each, ddof=1))


@functools.cache
def published() -> list[Line]:
    """The published lines; their means are computed from their 19 numbers."""
    out = []
    with PUBLISHED.open(newline="") as f:
        for row in csv_lib.DictReader(f):
            cells = _cells({task: {0: float(row[task]) / 100} for task in tasks.VTAB})
            out.append(Line(row["method"], "", "", cells, row["params"], "", (), "", row["source"], {}))
    return out


def chosen(every: list[Line]) -> list[Line]:
    """Our lines, and the published ones that belong beside them."""
    backbones = " ".join(line.settings.get("pretrained.name", "") for line in every).replace(
        "howto", "augreg"
    )
    shown = _SWIN if "swin" in backbones.lower() else _SHOWN
    names = {*shown, *(name for part, name in _MORE.items() if part in backbones)}
    return [line for line in every if not line.source or line.label in names]


def columns(every: list[Line]) -> list[str]:
    """Tasks that we ran, then the means that we have."""
    have = {name for line in every if not line.source for name in line.cells}
    return [name for name in (*tasks.VTAB, *MEANS) if name in have]


def text(every: list[Line]) -> str:
    """The table for the screen: a line of means, below it one of deviations."""
    every = chosen(every)
    names = columns(every)
    short = {**SHORT, **MEANS}
    out = [["", "protocol", "pixels", *(short[n] for n in names), "params", "head"]]
    for line in every:
        digits = 1 if line.source else 2
        out.append([line.label, line.protocol or "published", line.pixels])
        out[-1] += [_percent(line.cells[n][0], digits) if n in line.cells else "-" for n in names]
        out[-1] += [line.params, line.head]
        if any(sd is not None for _, sd in line.cells.values()):
            out.append([f"  ± over {line.counts} seeds", "", ""])
            out[-1] += [_percent(line.cells.get(n, (None, None))[1], 2) for n in names]
            out[-1] += ["", ""]
    aligned = ["left"] * 3 + ["right"] * (len(out[0]) - 3)
    return tabulate(out, tablefmt="plain", disable_numparse=True, colalign=aligned)


def markdown(every: list[Line]) -> str:
    """The same table in Markdown, `mean ± deviation` in a cell."""
    every = chosen(every)
    names = columns(every)
    header = ["method", "protocol", "pixels", "seeds", *(n.replace("_", " ") for n in names)]
    out = []
    for line in every:
        cells = []
        for name in names:
            mean, sd = line.cells.get(name, (None, None))
            digits = 1 if line.source else 2
            cells.append(_percent(mean, digits) + (f" ± {_percent(sd, 2)}" if sd is not None else ""))
        about = [line.label, line.protocol or "published", line.pixels, ", ".join(map(str, line.seeds))]
        out.append([*about, *cells, line.params, line.head])
    return tables.markdown([*header, "params", "head"], out, left=4)


def _percent(fraction, digits):
    return "" if fraction is None else f"{100 * fraction:.{digits}f}"


def csv(every: list[Line]) -> str:
    """All lines, published ones too, as CSV; fractions with full precision."""
    out = io.StringIO()
    names = [*tasks.VTAB, *MEANS]
    writer = csv_lib.writer(out, lineterminator="\n")
    about = (
        "method",
        "protocol",
        "pixels",
        "backbone",
        "seeds",
        "params",
        "head_params",
        "published_in",
    )
    writer.writerow([*about, *names, *(f"{n}_sd" for n in names)])
    for line in every:
        cells = [line.cells.get(name, (None, None)) for name in names]
        seeds = " ".join(map(str, line.seeds))
        backbone = line.settings.get("pretrained.name", "")
        head = [line.label, line.protocol, line.pixels, backbone, seeds, line.params, line.head]
        values = [*(c[0] for c in cells), *(c[1] for c in cells)]
        writer.writerow([*head, line.source, *("" if v is None else v for v in values)])
    return out.getvalue()


def plain(every: list[Line]) -> list[dict]:
    """All lines as JSON values."""
    return [line._asdict() for line in every]


def picture(every: list[Line]) -> bytes:
    """A PNG: accuracy of each task, ours with deviations, the published rows as open marks."""
    every = chosen(every)
    names = columns(every)
    short = {**SHORT, **MEANS}
    figure, ((axes,),) = plots.subplots(size=(5 + 0.4 * len(names), 4.5))
    for i, line in enumerate(every):
        shift = (i / max(len(every) - 1, 1) - 0.5) * 0.5
        points = [(j + shift, *line.cells[n]) for j, n in enumerate(names) if n in line.cells]
        x, mean, sd = (list(v) for v in zip(*points))
        label = ", ".join(filter(None, [line.label, line.protocol or "published", line.pixels]))
        style = dict(fmt="o", mfc="none", alpha=0.6) if line.source else dict(fmt="s", capsize=2)
        errors = None if line.source else [100 * (s or 0) for s in sd]
        axes.errorbar(
            x, [100 * m for m in mean], errors, ms=4, ls="none", label=plots.wrapped(label), **style
        )
    axes.set_xticks(range(len(names)), [short[n] for n in names], rotation=60)
    axes.set(ylabel="test accuracy [%]", xlim=(-0.6, len(names) - 0.4))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return plots.png(figure)
