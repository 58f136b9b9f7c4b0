"""Result files, tables and curves. `python -m rlrr_jax.report WORKDIR...` makes them again."""

import argparse
import io

from etils import epath

from rlrr_jax import files, summary
from rlrr_jax.data import tasks
from rlrr_jax.errors import UserError, one_sentence

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
    "epochs",
    "images/s",
    "time",
)


COMPARED = ("test_acc_final", "test_acc_best", "val_acc", "train_loss")  # of two results of a run
MOST_CURVES = 12  # in one picture


def folder(run):
    """Name of the folder of a run, or of a row: `"seed0"`, `"seed0-lr0.01"`."""
    return f"seed{run['seed']}" + (f"-{run['trial']}" if run.get("trial") else "")


def collect(*workdirs, out=None):
    """All finished runs below workdirs, also as files in the folder `out`.

    These are `results.json` (all rows), `results.md` (what the screen shows, and each run) and, where
    there is a VTAB task, `summary.{csv,json,png}`. With one workdir, `out` is that one.
    Raises UserError if there is no finished run, or if two workdirs disagree about one.
    """
    workdirs = [epath.Path(w).expanduser() for w in workdirs]
    out = epath.Path(out or workdirs[0]).expanduser()
    rows = _rows(workdirs)
    if not rows:
        raise UserError(f"there is no finished run in {', '.join(map(str, workdirs))}")
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "results.json", rows)
    unfinished = [line for w in workdirs for line in _unfinished(w)]
    lines = summary.lines(rows)
    text = [table(rows), caption(rows), *unfinished]
    if lines:
        text = [summary.markdown(lines), summary.CAPTION, *text]
        files.write(out / "summary.csv", summary.csv(lines))
        files.write_json(out / "summary.json", summary.plain(lines))
        files.write(out / "summary.png", summary.picture(lines))
    files.write(out / "results.md", "\n\n".join(text) + "\n")
    return rows


def _rows(workdirs):
    found = {}
    for workdir in workdirs:
        for path in sorted(workdir.glob("*/*/seed*/result.json")):
            row = files.read_json(path)
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


def table(rows):
    """Rows of `results.json` as an aligned Markdown table."""
    full = {r["task"]: r["trainable_params"] for r in rows if r["method"] == "full"}
    cells = [_cells(row, full.get(row["task"])) for row in rows]
    used = [i for i in range(len(COLUMNS)) if any(c[i] for c in cells)]
    lines = [[COLUMNS[i] for i in used], *([c[i] for i in used] for c in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]

    def text(line):
        left = (
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))
        )
        return "| " + " | ".join(left) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < 3 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def _cells(row, full):
    return [
        row["task"],
        " ".join([row["method"], *_which(row)]),
        row["protocol"],
        percent(row["val_acc"]) + " (val)"
        if row["test_acc_final"] is None
        else percent(row["test_acc_final"]),
        percent(row["test_acc_best"]),
        f"{row['trainable_params']:,}",
        percent(row["trainable_params"] / full) if full else "",
        f"{row['head_params']:,}",
        f"{row['lr']:g}",
        f"{row['epochs']}",
        f"{row['images_per_second']:,.0f}" if row["images_per_second"] else "",
        f"{row['wall_seconds']:.0f} s",
    ]


def _which(row):
    """What tells runs of a task and method apart, in words."""
    seed = [f"seed {row['seed']}"] if row["seed"] else []
    return seed + ([row["trial"].replace("-", " ")] if row.get("trial") else [])


def percent(fraction):
    """`"64.20 %"`; empty for None."""
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def all_curves(workdir, rows):
    """The curves of all runs of a workdir in one picture."""
    histories = {}
    for row in rows:
        name = " ".join([row["task"], row["method"], *_which(row)])
        path = epath.Path(workdir) / row["task"] / row["method"] / folder(row) / "metrics.jsonl"
        histories[name] = files.read_rows(path)
    curves(epath.Path(workdir) / "curves.png", histories)


def curves(path, histories):
    """Draws training loss and accuracy of several runs into a PNG.

    Args:
      path: of the picture.
      histories: name -> rows of its `metrics.jsonl`.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
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
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    files.write(path, picture.getvalue())


def caption(rows):
    """What the table's numbers are: one line for each setting of a task, and the columns."""
    lines = []
    for row in rows:
        tested = f"{row['num_test']:,} test images" if row["num_test"] else "200 validation images"
        lines.append(
            f"{row['task']}: {tested}, source {row['source']} ({row['dataset']}, {row['variant']} "
            f"pixels), backbone {row['backbone']} "
            f"(SHA-256 {row['backbone_sha256'][:12]}), {row['dtype']}, {row['device']}"
        )
    lines.append("test acc: after the last epoch. params: trained values outside the head.")
    return "\n".join(dict.fromkeys(lines))


def main():
    """The command."""
    parser = argparse.ArgumentParser(description="Makes the tables of finished runs again.")
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
