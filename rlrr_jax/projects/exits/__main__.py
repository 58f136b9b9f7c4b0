"""Accuracy against cost of early exits: `python -m rlrr_jax.projects.exits WORKDIR...`, of one task.

Runs with exits need config.protocol=vtab: the thresholds for a budget are chosen on the validation
images, by the run of its search that was not trained on them, and tested with the final run. Runs
without exits, of any depth, are put beside them. Writes `exits.json`, `exits.md` and `exits.png`.
"""

import pathlib
from typing import Any

import numpy as np
from tqdm import tqdm

from rlrr_jax import adapters, cards, files, models, run_images
from rlrr_jax.adapters import Adapter
from rlrr_jax.errors import Parser, UserError, one_sentence
from rlrr_jax.projects.exits import choose, leave, met, page
from rlrr_jax.results import plots, rows
from rlrr_jax.runs import identity


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m rlrr_jax.projects.exits", description=__doc__)
    parser.add_argument("workdirs", nargs="+", help="of finished runs of one task")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("exits"))
    adapters.add_flags(parser)
    args = parser.parse_args(argv)
    plans = plan(args.workdirs)
    runs = [measure(*one, **adapters.given(args)) for one in plans]
    groups: dict[str, list[page.Run]] = {}
    for run in runs:
        groups.setdefault(run.row["setting"], []).append(run)
    args.out.mkdir(parents=True, exist_ok=True)
    each = list(groups.values())
    text = page.text(each)
    files.write_json(args.out / "exits.json", [page.plain(group) for group in each])
    files.write(args.out / "exits.md", text)
    plots.save(args.out / "exits.png", page.draw, each)
    print(f"{text}\nwritten to {args.out}", flush=True)


def plan(workdirs: list[str]) -> list[tuple[pathlib.Path, Adapter, Adapter | None]]:
    """The finished runs, their adapters, and the adapters that choose their thresholds."""
    found = [path.resolve() for workdir in workdirs for path in adapters.finished(files.local(workdir))]
    if not found:
        raise UserError(f"there is no finished run in {', '.join(workdirs)}: give a --workdir")
    read = {path: adapters.read(path) for path in dict.fromkeys(found)}
    first = next(iter(read.values())).card
    for path, adapter in read.items():
        _check(path, adapter.card, first)
    plans = [(path, adapter, chooser(path, adapter)) for path, adapter in read.items()]
    if all(one is None for *_, one in plans):
        raise UserError(
            f"no run in {', '.join(workdirs)} has early exits: train one with config.loss=exits, "
            f"config.loss_kwargs.at and config.protocol=vtab"
        )
    return plans


def _check(path: pathlib.Path, card: dict, first: dict) -> None:
    """UserError unless a run was tested, of a ViT, and on the task and backbone of the first run."""
    for key in ("task", "image_size", "model", "backbone_sha256"):
        if card[key] != first[key]:
            raise UserError(
                f"{path} is a run with {key}={card[key]}, the first with {first[key]}: give runs alike"
            )
    if not models.is_vit(card["model"]):
        raise UserError(f"{path} is a run of {card['model']}: only ViTs have exits, give runs of one")
    if card["accuracy"].get("test_acc") is None:
        raise UserError(f"{path} was never tested (config.protocol=tune): leave it out")


def chooser(path: pathlib.Path, adapter: Adapter) -> Adapter | None:
    """The adapter of a run's settings that was not trained on the validation images; None: no exits.

    Raises UserError for a run with exits that has none.
    """
    if not leave.places(adapter):
        return None
    apart = ("seed", "protocol", "grid", "recipe", "epochs")  # of a run and of what it chose from
    same = lambda run: {k: v for k, v in identity.described(run).items() if k not in apart}
    for other in map(
        pathlib.Path, files.below(path.parent.parent / "search", "*", "adapter.safetensors")
    ):
        found = adapters.read(other)
        if same(found.run) == same(adapter.run):
            return found
    raise UserError(
        f"{path.parent} was trained on the validation images, too, and has no search beside it: train "
        f"it with config.protocol=vtab, so that thresholds can be chosen on them"
    )


def measure(path: pathlib.Path, adapter: Adapter, chooser: Adapter | None, **where: Any) -> page.Run:
    """What a run gives at its exits, and for each budget; `where` as in `adapters.backbone`."""
    row, size = rows.read(path.parent / "result.json"), cards.image_size(adapter.card)
    model = cards.model(adapter)
    plain = float(leave.flops(model, (), size)[-1])
    if chooser is None:
        return page.Run(row, plain, np.array([plain]), np.array([plain]), [row["test_acc_final"]], [])
    backbone, part = adapters.backbone(adapter, **where), run_images.task_of(adapter.run).parts[1]
    said, _ = probabilities(chooser, backbone, part)
    found, labels = probabilities(adapter, backbone, "test")
    at = leave.places(adapter)
    costs = leave.flops(model, at, size, met.is_met(cards.method(adapter)))
    thresholds = [choose.threshold_of(said, costs, budget) for budget in choose.budgets(costs)]
    points = [choose.point(found, labels, costs, threshold) for threshold in thresholds]
    alone = (found.argmax(-1) == labels[:, None]).mean(0).tolist()
    return page.Run(row, plain, costs, leave.flops(model, at, size), alone, points)


def probabilities(adapter: Adapter, backbone: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, E + 1, C] of a split's images at all exits, and their labels [N]."""
    run, parts = adapter.run, leave.stages(leave.load(adapter, backbone))
    images, labels = adapters.images(adapter, split)
    title = f"{run.task} {run.method} seed {run.seed}: {split}"
    with tqdm(total=len(labels), unit="img", desc=title, delay=2) as bar:
        every = leave.every(parts, images, run.eval_batch_size, bar.update)
    return every, np.asarray(labels)


if __name__ == "__main__":
    one_sentence(main)
