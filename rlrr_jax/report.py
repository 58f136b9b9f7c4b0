"""Result files, tables and curves. `python -m rlrr_jax.report WORKDIR...` makes them again."""

import statistics

from etils import epath
from ml_collections import ConfigDict

from rlrr_jax import config as config_lib
from rlrr_jax import files, plots, summary
from rlrr_jax.data import tasks
from rlrr_jax.errors import Parser, UserError, one_sentence

COLUMNS = (
    "task",
    "method",
    "protocol",
    "test acc",
    "best epoch's",
    "params",
    "of full",
    "head",
    "lr",
    "lr chosen from",
    "seeds",
    "epochs",
    "images/s",
    "time",
)


COMPARED = ("test_acc_final", "test_acc_best", "val_acc", "train_loss")  # of two results of a run
MOST_CURVES = 12  # in one picture
MOST_COMPARED = 4  # tasks in one picture


def method_folder(run):
    """Name of the folder above, or of a method with its options: `"rlrr"`, `"rlrr-rank2"`."""
    return run["method"] + (f"-{run['options']}" if run.get("options") else "")


def folder(run):
    """Name of the folder of a run, or of a row: `"seed0"`, `"seed0-lr0.01"`."""
    return f"seed{run['seed']}" + (f"-{run['trial']}" if run.get("trial") else "")


def collect(*workdirs, out=None):
    """All finished runs below workdirs, also as files in the folder `out`.

    These are `results.json` (all rows), `results.md` (what the screen shows, and each run), where there
    is a VTAB task, `summary.{csv,json,png}`, and where there are several methods, `comparison.png`.
    With one workdir, `out` is that one.
    Raises UserError if there is no finished run, or if two workdirs disagree about one.
    """
    workdirs = [epath.Path(w).expanduser() for w in workdirs]
    out = epath.Path(out or workdirs[0]).expanduser()
    rows = rows_of(workdirs)
    if not rows:
        raise UserError(f"there is no finished run in {', '.join(map(str, workdirs))}")
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "results.json", rows)
    unfinished = [line for w in workdirs for line in _unfinished(w)]
    lines = summary.lines(rows)
    text = [table(rows), caption(rows), *unfinished]
    if len(folded := fold(rows)) < len(rows):
        text += ["Each run:", _table([[row] for row in rows])]
    tested = [group for group in folded if group[0]["test_acc_final"] is not None]
    if len(tested) > len({group[0]["task"] for group in tested}) <= MOST_COMPARED:
        plots.save(out / "comparison.png", comparison, tested)
    if lines:
        text = [summary.markdown(lines), summary.CAPTION, *text]
        files.write(out / "summary.csv", summary.csv(lines))
        files.write_json(out / "summary.json", summary.plain(lines))
    files.write(out / "results.md", "\n\n".join(text) + "\n")
    if lines:
        plots.save(out / "summary.png", summary.picture, lines)
    return rows


def rows_of(workdirs):
    """Rows of all finished runs below workdirs, each once, in the order of tasks."""
    found = {}
    for workdir in workdirs:
        for path in sorted(workdir.glob("*/*/seed*/result.json")):
            row = read_row(path)
            if missing := {"identity", *COMPARED} - row.keys():
                raise UserError(
                    f"{path} is damaged (it lacks {', '.join(sorted(missing))}): delete "
                    f"{path.parent} to start that run again"
                )
            other, where = found.setdefault(row["identity"], (row, path))
            if _outcome(other) != _outcome(row):
                raise UserError(
                    f"{where} and {path} are results of the same run that differ: leave one out"
                )
    order = {name: i for i, name in enumerate(tasks.TASKS)}
    place = lambda row: (
        order.get(row["task"], len(order)),
        row["method"],
        row["seed"],
        row["identity"],
    )
    return sorted((row for row, _ in found.values()), key=place)


def read_row(path):
    """The row in a `result.json`; the `config`, `setting` and `line` of an older one are filled in.

    They come from the `config.json` beside it; UserError if that has gone.
    """
    row = files.read_json(path)
    if {"config", "setting", "line"} <= row.keys():
        return row
    saved = path.parent / "config.json"
    if not saved.exists():
        raise UserError(
            f"{path} was written by an older version, and its config.json is gone: restore that, or "
            f"delete {path.parent}"
        )
    values = config_lib.described(ConfigDict(files.read_json(saved)))
    return {**row, "config": values, **config_lib.digests(values)}


def _outcome(row):
    return [row[key] for key in COMPARED]


def _unfinished(workdir):
    """A line for each run that failed (and was not finished by another process)."""
    errors = sorted(workdir.glob("*/*/seed*/error.txt"))
    paths = [path for path in errors if not (path.parent / "result.json").exists()]
    last = lambda path: path.read_text().strip().splitlines()[-1]
    return [f"not finished: {' '.join(p.parts[-4:-1])}: {last(p)}" for p in paths]


def show(rows):
    """What is printed at the end: the table of tasks where there are several, else of runs."""
    lines = summary.lines(rows)
    several = len({row["task"] for row in rows if row["task"] in tasks.VTAB}) > 1
    if several and all(row["test_acc_final"] is not None for row in rows):
        return f"{summary.text(lines)}\n\n{summary.CAPTION}\n\n{caption(rows)}"
    return f"{table(rows)}\n\n{caption(rows)}"


def fold(rows):
    """Rows of the same setting, which differ in their seeds, put together: lists of rows."""
    groups = {}
    for row in rows:
        key = row["setting"]
        while any(other["seed"] == row["seed"] for other in groups.get(key, ())):
            key += " again"  # two runs of one seed are not two seeds
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def table(rows):
    """Rows of `results.json`, seeds folded, as an aligned Markdown table."""
    return _table(fold(rows))


def grid(groups):
    """Head and lines of the table of lists of rows (see `fold`), without empty columns."""
    full = {g[0]["task"]: g[0]["trainable_params"] for g in groups if g[0]["method"] == "full"}
    cells = [_cells(group, full.get(group[0]["task"])) for group in groups]
    used = [i for i in range(len(COLUMNS)) if any(c[i] for c in cells)]
    return [[COLUMNS[i] for i in used], *([c[i] for i in used] for c in cells)]


def _table(groups):
    lines = grid(groups)
    widths = [max(map(len, column)) for column in zip(*lines)]

    def text(line):
        left = (
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))
        )
        return "| " + " | ".join(left) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < 3 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def _cells(rows, full):
    row = rows[0]
    values = lambda key: [r[key] for r in rows]
    speeds = [speed for speed in values("images_per_second") if speed]
    return [
        row["task"],
        " ".join([row["method"], *_which(row, seed=len(rows) == 1)]),
        row["protocol"],
        spread(values("val_acc")) + " (val)"
        if row["test_acc_final"] is None
        else spread(values("test_acc_final")),
        spread(values("test_acc_best")),
        f"{row['trainable_params']:,}",
        percent(row["trainable_params"] / full) if full else "",
        f"{row['head_params']:,}",
        ", ".join(dict.fromkeys(f"{lr:g}" for lr in values("lr"))),
        " ".join(f"{lr:g}" for lr in row["grid"]["lr"]) if row.get("grid") else "",
        f"{len(rows)}" if len(rows) > 1 else "",
        f"{row['epochs']}",
        f"{sum(speeds) / len(speeds):,.0f}" if speeds else "",
        f"{sum(values('wall_seconds')):.0f} s",
    ]


def _which(row, seed=True):
    """What tells runs of a task and method apart, in words."""
    options = [f"{k}={v}" for k, v in row.get("method_kwargs", {}).items()]
    seed = [f"seed {row['seed']}"] if row["seed"] and seed else []
    return options + seed + ([row["trial"].replace("-", " ")] if row.get("trial") else [])


def percent(fraction):
    """`"64.20 %"`; empty for None."""
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def spread(fractions):
    """`"64.20 %"`, of several `"64.20 ± 0.31 %"` (standard deviation, n - 1); empty for None."""
    if None in fractions:
        return ""
    if len(fractions) == 1:
        return percent(fractions[0])
    mean, deviation = statistics.mean(fractions), statistics.stdev(fractions)
    return f"{100 * mean:.2f} ± {100 * deviation:.2f} %"


def label(group):
    """What a line of the table is called in a picture."""
    return " ".join([group[0]["method"], *_which(group[0], seed=len(group) == 1)])


def comparison(groups):
    """A PNG: test accuracy against the number of trained values, for each task.

    Args:
      groups: see `fold`.
    """
    names = list(dict.fromkeys(group[0]["task"] for group in groups))
    figure, axes = plots.subplots(1, len(names), (2.5 + 4.5 * len(names), 4.5))
    order = lambda group: group[0]["trainable_params"]
    labels = [label(group) for group in sorted(groups, key=order)]
    styles = {
        label: (plots.COLOURS[i % 7], plots.MARKS[i // 7 % 8])
        for i, label in enumerate(dict.fromkeys(labels))
    }
    drawn = {}
    for group in sorted(groups, key=order):
        axis = axes[0][names.index(group[0]["task"])]
        values = [100 * row["test_acc_final"] for row in group]
        error = statistics.stdev(values) if len(values) > 1 else None
        colour, mark = styles[label(group)]
        style = dict(color=colour, fmt=mark, ms=6, capsize=2)
        drawn[label(group)] = axis.errorbar(order(group), statistics.mean(values), error, **style)
    for axis, name in zip(axes[0], names):
        axis.set_xscale("symlog", linthresh=1000, linscale=0.5)
        axis.set_xticks([0, *(10**k for k in range(3, 9) if 10**k <= 3 * max(map(order, groups)))])
        axis.margins(x=0.1)
        axis.set(title=name, xlabel="trained values without the head", ylabel="test accuracy [%]")
        axis.grid(alpha=0.3)
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=9)
    return plots.png(figure)


def all_curves(workdir, rows):
    """The curves of all runs of a workdir in one picture."""
    histories = {}
    for row in rows:
        name = " ".join([row["task"], row["method"], *_which(row)])
        path = epath.Path(workdir) / row["task"] / method_folder(row) / folder(row)
        histories[name] = files.read_rows(path / "metrics.jsonl")
    plots.save(epath.Path(workdir) / "curves.png", curves, histories)


def curves(histories):
    """A PNG: training loss and accuracy of several runs by epoch.

    Args:
      histories: name -> rows of its `metrics.jsonl`.
    """
    figure, ((left, right),) = plots.subplots(1, 2, (9, 3.5))
    for name, rows in histories.items():
        epochs = [row["epoch"] + 1 for row in rows]
        (line,) = left.plot(epochs, [row["train_loss"] for row in rows], label=name)
        right.plot(epochs, [row["train_acc"] for row in rows], ":", color=line.get_color())
        for key in ("val_acc", "test_acc"):
            points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
            if points:
                right.plot(*zip(*points), "-o", ms=3, color=line.get_color())
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="accuracy", title="dotted: training, solid: held out")
    left.legend()
    return plots.png(figure)


def caption(rows):
    """What the table's numbers are: one line for each setting of a task, and the columns."""
    lines = []
    for row in rows:
        task = tasks.get(row["task"])
        held_out = f"{task.number(task.parts[1])} validation images"
        tested = f"{row['num_test']:,} test images" if row["num_test"] else held_out
        lines.append(
            f"{row['task']}: {tested}, source {row['source']} ({row['dataset']}, {row['variant']} "
            f"pixels), backbone {row['backbone']} "
            f"(SHA-256 {row['backbone_sha256'][:12]}), {row['dtype']}, {row['device']}"
        )
    several = any(len(group) > 1 for group in fold(rows))
    lines.append(
        "test acc: after the last epoch"
        + ", mean and standard deviation (n - 1) over seeds, time their sum" * several
        + ". params: trained values outside the head."
    )
    return "\n".join(dict.fromkeys(lines))


def main():
    """The command."""
    parser = Parser(description="Makes the tables of finished runs again.")
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="several are merged")
    parser.add_argument("--out", help="folder of the files; WORKDIR if it is one, else ./report")
    args = parser.parse_args()
    out = args.out or (args.workdirs[0] if len(args.workdirs) == 1 else "report")
    rows = collect(*args.workdirs, out=out)
    print(show(rows))
    for workdir in args.workdirs:
        print(*_unfinished(epath.Path(workdir).expanduser()), sep="\n", end="")
    print(f"\nfiles: {out}")


if __name__ == "__main__":
    one_sentence(main)
