"""Matplotlib figures as PNG bytes, drawn with our own settings whatever the user's are."""

import io
import os
import statistics
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from rlrr_jax import files
from rlrr_jax.errors import first_line
from rlrr_jax.results import rows as rows_lib
from rlrr_jax.results import tables

# The colours of Okabe and Ito, which colour-blind people tell apart, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKS = "osD^vPX*"


def settings() -> Any:
    """A context with Matplotlib's own defaults, whatever a matplotlibrc or MPLBACKEND says."""
    backend = os.environ.pop("MPLBACKEND", None)  # one that is not installed ends the import
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg"})


def subplots(rows: int = 1, columns: int = 1, size: tuple = (6.4, 4.8), **options: Any) -> tuple:
    """A figure of its own canvas, not pyplot's, and its axes [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def wrapped(name: str) -> str:
    """A name for a legend, of at most 40 characters a line where it has spaces or plus signs."""
    text = name.replace("+", "+ ")
    return textwrap.fill(text, 40, break_long_words=False, break_on_hyphens=False).replace("+ ", "+")


def png(figure: Any, dpi: int = 120) -> bytes:
    """A figure as PNG bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format="png")
    return picture.getvalue()


def save(path: Any, draw: Any, *args: Any) -> bool:
    """Writes the picture that `draw(*args)` returns, if any; one that fails costs no result.

    Returns whether it was written; if not, a warning is printed.
    """
    try:
        with settings():
            picture = draw(*args)
        if picture:
            files.write(path, picture)
        return bool(picture)
    except Exception as e:  # whatever a drawing library can raise
        print(f"warning: {path} was not drawn ({first_line(e)})", file=sys.stderr)
        return False


def curves(histories: dict[str, list[dict]]) -> bytes:
    """A PNG with training loss and accuracy of several runs by epoch.

    Args:
      histories: name -> rows of its `metrics.jsonl`.
    """
    figure, ((left, right),) = subplots(1, 2, (9, 3.5))
    for name, rows in histories.items():
        epochs = [row["epoch"] + 1 for row in rows]
        losses = [row["train_loss"] for row in rows]
        (line,) = left.plot(epochs, losses, label=wrapped(name))
        if "train_acc" in rows[0]:
            right.plot(epochs, [row["train_acc"] for row in rows], ":", color=line.get_color())
        seen = {key for row in rows for key in row}
        score = next((key for key in ("map", "r2") if {f"val_{key}", f"test_{key}"} & seen), "acc")
        for key in (f"val_{score}", f"test_{score}"):
            points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
            if points:
                right.plot(*zip(*points), "-o", ms=3, color=line.get_color())
        name = {"map": "mean average precision", "r2": "R²"}.get(score, "accuracy")
        dotted = "training (labels that are right)" if score == "map" else "training"
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel=name, title=f"dotted: {dotted}, solid: held out")
    left.legend(fontsize=8)
    return png(figure)


def reliability(bins: list[tuple], number: int) -> bytes:
    """A PNG with the part of answers that is right against how sure they are.

    Args:
      bins: what `metrics.calibration` gives.
      number: number of bins.
    """
    figure, ((axis,),) = subplots(size=(4.2, 4.6))
    total = sum(count for count, *_ in bins)
    share, right = ([part[i] for part in bins] for i in (1, 2))
    axis.plot([0, 1], [0, 1], "--", color="#888888", label="as sure as right")
    counts = [count / total for count, *_ in bins]
    axis.bar(share, counts, 0.8 / number, color=COLOURS[5], alpha=0.5, label="part of the answers")
    axis.plot(share, right, "-o", color=COLOURS[0], ms=4, label="part that is right")
    axis.set(xlabel="how sure", xlim=(0, 1), ylim=(0, 1))
    figure.legend(fontsize=8, loc="outside upper left")
    return png(figure)


def values(labels: Any, answers: Any) -> bytes:
    """A PNG with answers against values [N]."""
    figure, ((axis,),) = subplots(size=(4.2, 4))
    ends = [min(labels.min(), answers.min()), max(labels.max(), answers.max())]
    axis.plot(ends, ends, "--", color="#888888")
    axis.plot(labels, answers, "o", color=COLOURS[0], ms=3, alpha=0.5)
    axis.set(xlabel="value", ylabel="answer")
    return png(figure)


def histories(workdir: Any, rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of `metrics.jsonl` of all runs of a workdir, by the names of the runs."""
    names = tables.labels([[row] for row in rows])
    read = lambda row: files.read_rows(rows_lib.folder(workdir, row) / "metrics.jsonl")
    return {f"{row['task']} {name}": read(row) for row, name in zip(rows, names)}


def comparison(groups: list[list[dict]], seconds: Callable | None = None) -> bytes:
    """A PNG with test accuracy against the number of trained values, for each task.

    Args:
      groups: lists of rows, see `rows.fold`.
      seconds: function from a row to the seconds of its training, or None where they are not known: a
        second line of panels shows them.
    """
    names = list(dict.fromkeys(group[0]["task"] for group in groups))
    places = [lambda row: row["trainable_params"], *([seconds] if seconds else [])]
    size = 2.5 + 4.5 * len(names), 4.5 * len(places)
    figure, axes = subplots(len(places), len(names), size)
    order = lambda group: group[0]["trainable_params"]
    groups = sorted(groups, key=order)
    labels = tables.labels(groups)
    styles = {
        label: (COLOURS[i % 7], MARKS[i // 7 % 8]) for i, label in enumerate(dict.fromkeys(labels))
    }
    drawn = {}
    for group, label in zip(groups, labels):
        column = names.index(group[0]["task"])
        values = [100 * row["test_acc_final"] for row in group if row["test_acc_final"] is not None]
        if not values:
            continue
        error = statistics.stdev(values) if len(values) > 1 else None
        colour, mark = styles[label]
        style = dict(color=colour, fmt=mark, ms=6, capsize=2)
        for line, place in zip(axes, places):
            if (x := place(group[0])) is not None:
                drawn[label] = line[column].errorbar(x, statistics.mean(values), error, **style)
    for axis, name in zip(axes[0], names):
        axis.set_xscale("symlog", linthresh=1000, linscale=0.5)
        axis.set_xticks([0, *(10**k for k in range(3, 9) if 10**k <= 3 * max(map(order, groups)))])
        axis.margins(x=0.1)
        score = next(g[0].get("score") for g in groups if g[0]["task"] == name)
        what = {"map": "test mAP", "r2": "100 x test R²"}.get(score or "", "test accuracy")
        unit = "" if score == "r2" else " [%]"
        axis.set(title=name, xlabel="trained values without the head", ylabel=f"{what}{unit}")
        axis.grid(alpha=0.3)
    for above, axis in zip(axes[0], axes[-1] if seconds else ()):
        axis.set(xlabel="seconds of training, a run", ylabel=above.get_ylabel())
        axis.margins(x=0.1)
        axis.grid(alpha=0.3)
    figure.legend(drawn.values(), map(wrapped, drawn), loc="outside right upper", fontsize=9)
    return png(figure)
