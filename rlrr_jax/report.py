"""Result files, tables and curves."""

import io

from etils import epath

from rlrr_jax import files

COLUMNS = (
    "task",
    "method",
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


def collect(workdir):
    """All finished runs below a workdir, also as `results.json` and `results.md` there."""
    workdir = epath.Path(workdir)
    rows = [files.read_json(path) for path in sorted(workdir.glob("*/*/seed*/result.json"))]
    files.write_json(workdir / "results.json", rows)
    files.write(workdir / "results.md", f"{table(rows)}\n\n{caption(rows)}\n")
    return rows


def table(rows):
    """Rows of `results.json` as an aligned Markdown table."""
    full = {r["task"]: r["trainable_params"] for r in rows if r["method"] == "full"}
    cells = [_cells(row, full.get(row["task"])) for row in rows]
    used = [i for i in range(len(COLUMNS)) if any(c[i] for c in cells)]
    lines = [[COLUMNS[i] for i in used], *([c[i] for i in used] for c in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]

    def text(line):
        left = (
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))
        )
        return "| " + " | ".join(left) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def _cells(row, full):
    return [
        row["task"],
        row["method"] + (f" seed {row['seed']}" if row["seed"] else ""),
        percent(row["test_acc_final"])
        if row["val_acc"] is None
        else percent(row["val_acc"]) + " (val)",
        percent(row["test_acc_best"]),
        f"{row['trainable_params']:,}",
        percent(row["trainable_params"] / full) if full else "",
        f"{row['head_params']:,}",
        f"{row['lr']:g}",
        f"{row['epochs']}",
        f"{row['images_per_second']:,.0f}" if row["images_per_second"] else "",
        f"{row['wall_seconds']:.0f} s",
    ]


def percent(fraction):
    """`"64.20 %"`; empty for None."""
    return "" if fraction is None else f"{100 * fraction:.2f} %"


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
            f"{row['task']}: {tested}, protocol {row['protocol']}, source {row['source']} "
            f"({row['variant']} pixels), backbone {row['backbone']} "
            f"(SHA-256 {row['backbone_sha256'][:12]}), {row['dtype']}, {row['device']}"
        )
    lines.append("test acc: after the last epoch. params: trained values outside the head.")
    return "\n".join(dict.fromkeys(lines))
