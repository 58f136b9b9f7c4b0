"""The table of the five FGVC datasets: seeds folded, beside published rows."""

import csv
import pathlib
import statistics

from rlrr_jax.projects.fgvc.data import FGVC
from rlrr_jax.results import tables, vtab_table
from rlrr_jax.results.rows import diverged

PUBLISHED = pathlib.Path(__file__).parent / "published.csv"
COLUMNS = dict(zip(FGVC, ("cub", "nabirds", "flowers", "dogs", "cars")))  # names in that file
CAPTION = """\
Test accuracy in percent, mean and standard deviation (n - 1) over seeds; mean: of the five datasets,
left out where one is missing. params: trained values, with the mean head. trained on: "trainval", the
official training images (of Flowers training and validation), or VPT's "train", nine tenths of them (of
Flowers half); empty where it is not known. Published rows are copied from their sources
(projects/fgvc/published.csv), * is AugReg's ViT-B/16; RLRR's are of the best epoch."""


def table(rows: list[dict]) -> str:
    """Our lines and the published ones, in Markdown, with a caption; "" without tested rows of FGVC.

    Args:
      rows: of `results.json`. A line is what `row["line"]` says tasks and seeds have in common.

    Raises UserError for rows that `vtab_table.by_task` cannot put into one line.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["task"] in FGVC and row["test_acc_final"] is not None and not diverged(row):
            groups.setdefault(row["line"], []).append(row)
    if not groups:
        return ""
    names = tables.labels([[row for row in g if row["task"] == g[0]["task"]] for g in groups.values()])
    notes = tables.differing([tables.settings(g[0]) for g in groups.values()], ("task",))
    if len(set(names)) < len(names):  # lines of different tasks
        names = [" ".join([name, *note]) for name, note in zip(names, notes)]
    lines = [_line(group, name) for group, name in zip(groups.values(), names)]
    header = ["", *COLUMNS.values(), "mean", "params", "trained on"]
    return tables.markdown(header, lines + [_published(row) for row in published()]) + f"\n\n{CAPTION}"


def published() -> list[dict[str, str]]:
    """Rows of the file of published numbers."""
    with PUBLISHED.open(newline="") as f:
        return list(csv.DictReader(f))


def _published(row: dict[str, str]) -> list[str]:
    values = [float(row[name]) for name in COLUMNS.values()]
    cells = [f"{value:.1f}" for value in (*values, statistics.mean(values))]
    return [f"{row['method']}, published", *cells, row["params_with_head"], row["trained_on"]]


def _line(group: list[dict], name: str) -> list[str]:
    """A line of ours; the deviation of a mean is that of the seeds that all datasets have."""
    found = vtab_table.by_task(group, "test_acc_final")
    accuracies = {task: found.get(task, {}) for task in COLUMNS}
    cells = [_spread(list(seeds.values())) for seeds in accuracies.values()]
    shared = set.intersection(*(set(seeds) for seeds in accuracies.values()))
    means = [statistics.mean(seeds[seed] for seeds in accuracies.values()) for seed in sorted(shared)]
    heads = {row["task"]: row["head_params"] for row in group}
    params = (group[0]["trainable_params"] + statistics.mean(heads.values())) / 1e6
    return [name, *cells, _spread(means), f"{params:.2f}M", "trainval"]


def _spread(values: list[float]) -> str:
    return tables.spread(values).removesuffix(" %") if values else ""
