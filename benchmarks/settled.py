"""The table and picture of docs/real_images.md: accuracy on each task, and what it costs.

    python benchmarks/settled.py docs/real_images/settled.json --cost docs/real_images/cost.json \
        --against "rlrr precision=bfloat16" --images 20000 --out docs/real_images/settled.png

Rows are those of `results.json`. `--cost` is the last line that benchmarks/step.py prints, where every
line's method is measured in turns with all others: its seconds are those of `--images` training images,
on a machine that does nothing else.
"""

import argparse
import json
import pathlib
import statistics

from rlrr_jax.results import paired, plots, rows, tables


def main():
    """The command."""
    args = arguments()
    found = rows.find([args.rows])
    cost = costs(json.loads(args.cost.read_text())["rows"], args.images)
    table = paired.by_task(found, args.against).splitlines()
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    by_label = {}
    for name in dict.fromkeys(row["task"] for row in found):
        groups = rows.fold([row for row in found if row["task"] == name])
        by_label |= dict(zip(tables.labels(groups, seed=False), groups))
    for line in lines:
        seconds, memory = cost.get(key(by_label[line[0]][0]), (None, None))
        line[2:2] = [f"{seconds:.0f} s", f"{memory:.2f} GiB"] if seconds else ["", ""]
    print(tables.markdown([*head[:2], "seconds", "memory", *head[2:]], lines))
    print(f"\n{tables.table(found)}\n\n{tables.caption(found)}")
    if args.out:
        args.out.write_bytes(picture(rows.fold(found), cost))


def arguments():
    """Of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", help="a results.json, or a workdir")
    parser.add_argument("--cost", type=pathlib.Path, required=True)
    parser.add_argument("--against", required=True, help="label of a line")
    parser.add_argument("--images", type=int, required=True, help="training images of a run")
    parser.add_argument("--out", type=pathlib.Path, help="a .png")
    return parser.parse_args()


def key(row):
    """A line's method as benchmarks/step.py names it, `"rlrr/rank=4"`; its start costs nothing."""
    options = [f"{k}={v}" for k, v in sorted(row["method_kwargs"].items()) if k != "init"]
    return "/".join([row["method"], *options])


def costs(cases, images):
    """Method -> seconds of so many training images, and GiB of its training program."""
    speed = lambda case: images / statistics.median(case["train"])
    plain = lambda words: [word for word in sorted(words) if not word.startswith("init=")]
    name = lambda text: "/".join([text.split("/")[0], *plain(text.split("/")[1:])])
    return {name(case["method"]): (speed(case), case["train_gib"]) for case in cases}


def picture(groups, cost):
    """A PNG: accuracy of each task against trained values, and against seconds."""
    names = list(dict.fromkeys(group[0]["task"] for group in groups))
    labels = list(dict.fromkeys(map(tables.label, groups)))
    figure, axes = plots.subplots(2, len(names), (3 + 4 * len(names), 7.5))
    drawn = {}
    for group in groups:
        row, label = group[0], tables.label(group)
        values = [100 * r["test_acc_final"] for r in group]
        error = statistics.stdev(values) if len(values) > 1 else None
        i = labels.index(label)
        style = dict(color=plots.COLOURS[i % 7], fmt=plots.MARKS[i // 7 % 8], ms=6, capsize=2)
        places = row["trainable_params"], cost.get(key(row), (None,))[0]
        for axis, place in zip(axes[:, names.index(row["task"])], places):
            if place is not None:
                drawn[label] = axis.errorbar(place, statistics.mean(values), error, **style)
    for top, bottom, name in zip(*axes, names):
        top.set_xscale("symlog", linthresh=10_000, linscale=0.5)
        top.set(title=name, xlabel="trained values without the head", ylabel="test accuracy [%]")
        bottom.set(xlabel="seconds of training, a run", ylabel="test accuracy [%]")
        for axis in (top, bottom):
            axis.margins(x=0.15)
            axis.grid(alpha=0.3)
    short = [label.replace(" precision=bfloat16", "") for label in drawn]
    figure.legend(drawn.values(), short, loc="outside lower center", ncols=3, fontsize=9)
    return plots.png(figure)


if __name__ == "__main__":
    main()
