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

from rlrr_jax.errors import UserError, one_sentence
from rlrr_jax.results import paired, plots, rows, tables


def main():
    """The command."""
    args = arguments()
    found = rows.find([], [args.rows])
    paired.differences(found, args.against)  # a name of no line ends it here
    cost = costs(measured(args.cost), args.images)
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
        seconds = lambda row: cost.get(key(row), (None,))[0]
        plots.save(args.out, plots.comparison, rows.fold(found), seconds)


def arguments():
    """Of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", help="a results.json")
    parser.add_argument("--cost", type=pathlib.Path, required=True)
    parser.add_argument("--against", required=True, help="label of a line")
    parser.add_argument("--images", type=int, required=True, help="training images of a run")
    parser.add_argument("--out", type=pathlib.Path, help="a .png")
    return parser.parse_args()


def measured(path):
    """The cases of what benchmarks/step.py printed last."""
    try:
        return json.loads(path.read_text())["rows"]
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(
            f"{path} is not what benchmarks/step.py prints last: save that line alone"
        ) from e


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


if __name__ == "__main__":
    one_sentence(main)
