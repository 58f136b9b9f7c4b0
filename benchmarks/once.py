"""What computing the frozen blocks once saves: whole runs with and without it, in one process.

    python benchmarks/once.py --data ~/tensorflow_datasets --weights FILE
    python benchmarks/once.py --data DIR --weights FILE --size 112 --epochs 5

Trains on 800 images of a VTAB-1k task and evaluates on 200 (`protocol=tune`): a linear probe, the last
two blocks, and a search of 18 linear trials. Prints seconds of each, what they are of the run without,
the largest relative difference of an epoch's loss, and both accuracies. The last line is JSON.
"""

import argparse
import json
import pathlib
import tempfile
import time

from rlrr_jax import prefix, suite
from rlrr_jax.configs import vtab

CASES = {
    "linear": ("method=linear", None),
    "last 2 blocks": ("method=last,blocks=2", None),
    "18 linear trials": (
        "method=linear",
        ({"lr": (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003), "weight_decay": (0.0, 1e-4, 1e-2)},),
    ),
}


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the VTAB-1k task")
    parser.add_argument("--weights", required=True, help="a ViT-Ti/16")
    parser.add_argument("--task", default="cifar")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--cases", default=",".join(CASES), help="some of these")
    args = parser.parse_args()
    found, blocks = {}, prefix.blocks
    train(args, "linear", epochs=1)  # images are decoded
    for name in args.cases.split(","):
        for kind, rule in (("once", blocks), ("always", lambda recipe, run: 0)):
            if name == "18 linear trials" and kind == "always":
                continue  # as many times the linear probe
            prefix.blocks = rule
            found[name, kind] = train(args, name)
            print(f"{name}, {kind}: {found[name, kind]['seconds']:.1f} s", flush=True)
    print(table(found))
    rows = [{"case": name, "kind": kind, **numbers} for (name, kind), numbers in found.items()]
    print(json.dumps({**vars(args), "rows": rows}))


def train(args, name, epochs=None):
    """Seconds, losses of the epochs and the last accuracy of the first run of a case."""
    arg, runs = CASES[name]
    config = vtab.get_config(f"{args.task},{arg}")
    config.update(protocol="tune", epochs=epochs or args.epochs, image_size=args.size, flip=False)
    config.model.variant, config.pretrained.name = "Ti/16", args.weights
    config.data.dir, config.runs = args.data, runs
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        _, problems = suite.run(config, pathlib.Path(folder))
        seconds = time.perf_counter() - begun
        assert not problems, problems
        path = sorted(pathlib.Path(folder).glob("*/*/seed0*/metrics.jsonl"))[0]
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [line["train_loss"] for line in lines]
    return {"seconds": seconds, "losses": losses, "accuracy": lines[-1]["val_acc"]}


def table(found):
    """The numbers as Markdown."""
    lines = ["| case | once | always | ratio | loss differs by | accuracy, once and always |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in (case for case in CASES if (case, "once") in found):
        once, always = found[name, "once"], found.get((name, "always"))
        if always is None:
            ratio = once["seconds"] / found["linear", "once"]["seconds"]
            lines.append(f"| {name} | {once['seconds']:.1f} s | | {ratio:.2f} of one linear run | | |")
            continue
        differs = max(abs(a - b) / b for a, b in zip(once["losses"], always["losses"]))
        cells = [name, f"{once['seconds']:.1f} s", f"{always['seconds']:.1f} s"]
        cells += [f"{always['seconds'] / once['seconds']:.1f}", f"{differs:.0e}"]
        cells.append(f"{100 * once['accuracy']:.2f} and {100 * always['accuracy']:.2f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
