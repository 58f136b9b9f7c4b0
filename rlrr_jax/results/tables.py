"""The table of runs, and what its numbers are."""

import json
import re
import statistics
from collections.abc import Iterable
from typing import Any

from flax.traverse_util import flatten_dict
from tabulate import tabulate

from rlrr_jax import metrics
from rlrr_jax.checks import GRID
from rlrr_jax.results import rows as rows_lib
from rlrr_jax.runs import identity

COLUMNS = (
    *("task", "method", "protocol", "test acc", "best epoch's", "balanced acc", "macro F1"),
    *("largest class", "mean error", "ECE", "temperature", "epoch kept", "params", "of full", "head"),
    *("lr", "lr chosen from", "loss chosen", "val acc of tried", "seeds", "epochs", "images/s", "time"),
)

MIXED = ("mixup", "cutmix", "label_smoothing", "average")  # keys that are shown where they are on
UNEQUAL = 3  # times as many images of the largest class as of the smallest: more columns are shown


def markdown(head: list[str], lines: list[list], left: int = 1) -> str:
    """A Markdown table, its columns aligned.

    Args:
      head: names of the columns.
      lines: cells, as text.
      left: number of columns, from the first, that are aligned to the left; others to the right.
    """
    align = ["left"] * left + ["right"] * (len(head) - left)
    return tabulate(lines, head, tablefmt="pipe", disable_numparse=True, colalign=align)


def table(rows: list[dict]) -> str:
    """Rows of `results.json`, seeds folded, as a Markdown table."""
    return grouped(rows_lib.fold(rows))


def grouped(groups: list[list[dict]]) -> str:
    """The table of lists of rows, a line for each list."""
    head, *lines = cells(groups)
    return markdown(head, lines, left=3)


def cells(groups: list[list[dict]]) -> list[list[str]]:
    """Head and lines of the table of lists of rows (see `rows.fold`), without empty columns."""
    size = lambda row: (row["task"], json.dumps((row.get("config") or {}).get("model"), sort_keys=True))
    full = {size(g[0]): g[0]["trainable_params"] for g in groups if g[0]["method"] == "full"}
    names = labels(groups, shown=("protocol", "epochs", "lr"))
    lines = [_line(group, name, full.get(size(group[0]))) for group, name in zip(groups, names)]
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines)]
    return [[COLUMNS[i] for i in used], *([line[i] for i in used] for line in lines)]


def _line(rows: list[dict], name: str, full: int | None) -> list[str]:
    """The cells of runs that differ in their seeds.

    Args:
      name: label of the line.
      full: number of values that full fine-tuning trains of the same model, if it is there.
    """
    row = rows[0]
    values = lambda key: [r[key] for r in rows]
    speeds = [speed for speed in values("images_per_second") if speed]
    trains = row.get("epochs_trained") != 0
    return [
        row["task"],
        name,
        row["protocol"],
        accuracy(rows),
        spread(values("test_acc_best")),
        *_judged(rows),
        f"{row['trainable_params']:,}",
        percent(row["trainable_params"] / full) if full else "",
        f"{row['head_params']:,}",
        ", ".join(dict.fromkeys(f"{lr:g}" for lr in values("lr"))) if trains else "",
        searched(row),
        chosen(row),
        tried(row.get("val_tried")),
        f"{len(rows)}" if len(rows) > 1 else "",
        ", ".join(dict.fromkeys(f"{r.get('epochs_trained', r['epochs'])}" for r in rows)),
        f"{sum(speeds) / len(speeds):,.0f}" if speeds and trains else "",
        f"{sum(values('wall_seconds')):.0f} s",
    ]


def _judged(rows: list[dict]) -> list[str]:
    """Cells of what is shown of one's own images beside their score; empty for tasks of others."""
    row, alive = rows[0], [row for row in rows if not rows_lib.diverged(row)]
    found = lambda key: [r["metrics"].get(key) for r in alive if r.get("metrics")]
    mean = lambda values: sum(values) / len(values) if values and None not in values else None
    heat = mean([r.get("temperature") for r in alive])
    kept = [f"{r['kept_epoch'] + 1}" for r in rows if r.get("kept_epoch") is not None]
    ends = ["" if heat is None else f"{heat:.2f}", ", ".join(kept)]
    if not (row.get("config") or {}).get("own"):
        return [*[""] * 5, *ends]
    unequal = (row.get("class_ratio") or 0) >= UNEQUAL
    error = mean(found("mae"))
    return [
        percent(mean(found("balanced_acc"))) if unequal else "",
        percent(mean(found("macro_f1"))) if unequal or row.get("score") == "map" else "",
        percent(row["largest_class"]) if unequal else "",
        "" if error is None else f"{error:.4g}",
        percent(mean(found("ece"))),
        *ends,
    ]


def accuracy(rows: list[dict]) -> str:
    """The score of runs, without those that diverged, which are counted."""
    alive = [row for row in rows if not rows_lib.diverged(row)]
    key = "val_acc" if rows[0]["test_acc_final"] is None else "test_acc_final"
    text = scores(rows[0].get("score"), [row[key] for row in alive]) if alive else ""
    text += " (val)" * bool(text and key == "val_acc")
    if len(alive) == len(rows):
        return text
    gone = "diverged" if len(rows) == 1 else f"{len(rows) - len(alive)} of {len(rows)} diverged"
    return f"{text}, {gone}" if text else gone


def scores(name: str | None, values: list) -> str:
    """`spread` of scores with their name, but accuracy; R² is no percentage."""
    if name == "r2" and None not in values:
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{deviation} R²"
    return spread(values) + (" mAP" if name == "map" else "")


def which(row: dict, seed: bool = True) -> list[str]:
    """What tells runs of a task and method apart, in words: `["rank=2", "seed 1"]`."""
    options, trial = (
        [f"{k}={v}" for k, v in row.get("method_kwargs", {}).items()],
        row.get("trial") or "",
    )
    model = (row.get("config") or {}).get("model") or {}
    options += [f"block={model['block']}"] if model.get("block") else []
    plain = {kind.score: kind.loss for kind in metrics.KINDS.values()}[row.get("score") or "acc"]
    if row.get("loss", plain) != plain and "loss" not in trial:
        options.append(f"loss={row['loss']}")
    fixed = {k: v for k, v in (row.get("loss_kwargs") or {}).items() if isinstance(v, list | tuple)}
    options += [f"{k}={'+'.join(map(str, v))}" for k, v in fixed.items()]
    if row.get("precision") not in (None, "highest", "default") and "precision" not in trial:
        options.append(f"precision={row['precision']}")  # other than what goes with the dtype
    options += [f"gradients={row['gradients']}"] if row.get("gradients") else []
    options += [f"depth={model['depth']}"] if model.get("depth") else []
    options += [f"{key}={row[key]:g}" for key in MIXED if row.get(key) and key not in trial]
    if (weights := row.get("class_weights")) and "class_weights" not in trial:
        options.append(f"class_weights={'given' if weights.startswith('{') else weights}")
    options += [f"{key}={row[key]}" for key in ("keep",) if row.get(key) and key not in trial]
    seeds = [f"seed {row['seed']}"] if row["seed"] and seed else []
    return options + seeds + changed(row)


def changed(row: dict) -> list[str]:
    """`["lr=1e-05", "gelu=tanh"]` of a run in the folder `lr1e-05-gelutanh`."""
    groups = [row, row.get("loss_kwargs"), *(row.get("config") or {}).values()]
    known = sorted({key for group in groups if isinstance(group, dict) for key in group}, key=len)
    out = []
    for word in re.split(r"-(?=[a-z])", row.get("trial") or ""):
        keys = [key for key in known if word.startswith(key)]
        out += [f"{keys[-1]}={word.removeprefix(keys[-1])}" if keys else word] if word else []
    return out


def chosen(row: dict) -> str:
    """`"lam=0.1 sigma=0.5"`: options of the loss that a search chose; empty if it chose none."""
    grid, options = row.get("grid") or {}, row.get("loss_kwargs") or {}
    return " ".join(f"{key}={options[key]:g}" for key in sorted(grid) if grid[key] and key in options)


def searched(row: dict) -> str:
    """`"0.001 0.003 0.01"`: learning rates that a search tried, and whether it chose an end."""
    found = (row.get("tried") or row.get("grid") or {}).get("lr") or ()
    text = " ".join(f"{lr:g}" for lr in found)
    return text + " (end)" * (len(found) > 1 and row["lr"] in (min(found), max(found)))


def tried(fractions: list | None) -> str:
    """`"54.50 to 60.00 %"` of what a search tried; empty for none, or for one."""
    if not fractions or len(fractions) < 2:
        return ""
    return f"{100 * min(fractions):.2f} to {100 * max(fractions):.2f} %"


def percent(fraction: float | None) -> str:
    """`"64.20 %"`; empty for None."""
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def spread(fractions: list) -> str:
    """`"64.20 %"`, of several `"64.20 ± 0.31 %"` (standard deviation, n - 1); empty for None."""
    if None in fractions:
        return ""
    if len(fractions) == 1:
        return percent(fractions[0])
    mean, deviation = statistics.mean(fractions), statistics.stdev(fractions)
    return f"{100 * mean:.2f} ± {100 * deviation:.2f} %"


def label(group: list[dict], seed: bool = True) -> str:
    """What runs that differ in their seeds are called: method, options and what else was changed."""
    return " ".join([group[0]["method"], *which(group[0], seed and len(group) == 1)])


# Settings in the order in which they tell lines apart; others come after them.
FIRST = ("model.variant", "pretrained.name", "image_size", "protocol", "epochs", "batch_size", *GRID)


def labels(groups: list[list[dict]], shown: Iterable[str] = (), seed: bool = True) -> list[str]:
    """A `label` of each group, followed by settings where groups of a task would be called the same.

    Args:
      groups: lists of rows, see `rows.fold`.
      shown: settings that are in columns of their own, and need not be in the label.
      seed: whether the seed of a single run is part of its label.
    """
    out = [label(group, seed) for group in groups]
    alike: dict[tuple, list[int]] = {}
    for i, group in enumerate(groups):
        alike.setdefault((group[0]["task"], out[i]), []).append(i)
    for members in alike.values():
        notes = differing([settings(groups[i][0]) for i in members], shown)
        for i, note in zip(members, notes):
            out[i] = " ".join([out[i], *note])
    return out


def settings(row: dict) -> dict[str, Any]:
    """Settings of a row by their dotted names, see `identity.setting`."""
    return flatten_dict(identity.setting(row["config"]), sep=".")


def differing(each: list[dict], shown: Iterable[str] = ()) -> list[list[str]]:
    """Words such as `image_size=64` that tell settings apart: as few as do, none where all are equal.

    Args:
      each: settings by their names.
      shown: names that tell them apart without being in the words.
    """
    every = dict.fromkeys([*shown, *FIRST, *sorted({key for values in each for key in values})])
    text = lambda values, key: str(values.get(key))[-40:]
    found: list[tuple] = [()] * len(each)
    words: list[list[str]] = [[] for _ in each]
    for key in every:
        longer = [(*seen, text(values, key)) for seen, values in zip(found, each)]
        if len(set(longer)) == len(set(found)):
            continue
        found = longer
        for values, mine in zip(each, words):
            if key not in shown:
                mine.append(f"{key.rpartition('.')[2]}={text(values, key)}")
    return words


def caption(rows: list[dict]) -> str:
    """What the table's numbers are: one line for each setting of a task, and the columns."""
    lines = []
    for row in rows:
        tested = (
            f"{row['num_test']:,} test images"
            if row["num_test"]
            else f"{row['num_val']:,} validation images"
        )
        lines.append(
            f"{row['task']}: {tested}, source {row['source']} ({row['dataset']}, {row['variant']} "
            f"pixels), backbone {row['backbone']} "
            f"(SHA-256 {row['backbone_sha256'][:12]}), {row['dtype']}, {row['device']}"
        )
    gone = [
        " ".join([r["task"], label([r]), f"seed {r['seed']}"]) for r in rows if rows_lib.diverged(r)
    ]
    if any((row.get("class_ratio") or 0) >= UNEQUAL for row in rows if row["config"].get("own")):
        lines.append(
            f"classes are unequal, the largest {UNEQUAL} times the smallest or more; largest class: "
            f"what naming it always gets"
        )
    if any(row.get("score") == "map" for row in rows):
        lines.append("mAP: mean average precision over labels")
    if gone:
        lines.append(f"diverged, and left out of means: {', '.join(gone)}")
    several = any(len(group) > 1 for group in rows_lib.fold(rows))
    kept = any(row.get("kept_epoch") is not None for row in rows)
    last = "the epoch that was best on images set aside, or the last" if kept else "the last epoch"
    lines.append(
        f"test acc: after {last}"
        + ", mean and standard deviation (n - 1) over seeds, time their sum" * several
        + ". params: trained values outside the head."
    )
    return "\n".join(dict.fromkeys(lines))
