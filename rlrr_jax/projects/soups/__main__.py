"""Seeds together: `python -m rlrr_jax.projects.soups WORKDIR...` of finished runs.

Every adapter folds into its backbone, so the mean of several seeds' merged weights is one model again,
and costs what one costs (Wortsman et al., ICML 2022, "model soups"). Beside it stand the mean of the
seeds' shares, which costs as many models, and both with mirrored images, which costs twice as much.
Nothing is chosen: every seed goes in. Writes `soups.md` and `soups.json`.
"""

import functools
import statistics
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from scipy import special
from tqdm import tqdm

from rlrr_jax import adapters, files, metrics, run_images
from rlrr_jax.errors import Parser, UserError, one_sentence
from rlrr_jax.results import rows as rows_lib
from rlrr_jax.results import tables

COLUMNS = ["task", "method", "seeds", "each alone", "mean of weights", "mean of answers"]
MIRRORED = ["each, mirrored", "weights, mirrored", "answers, mirrored"]
CAPTION = """\
Test scores. Each alone: mean and deviation over seeds. Mean of weights: one model, whose every weight
is the mean of the seeds', heads too. Mean of answers: of the seeds' shares, as many times the work.
Mirrored: the mean of the shares of an image and its mirror image, twice the work."""


class Soup(NamedTuple):
    """What the seeds of one line give.

    Attributes:
      task: name of the task.
      label: what the line is called.
      seeds: the seeds.
      score: name of the score, see `metrics.KINDS`.
      alone: score of each seed.
      weights: score of the mean of weights.
      answers: score of the mean of answers.
      mirrored: the last three, with mirrored images; None without.
    """

    task: str
    label: str
    seeds: list[int]
    score: str
    alone: list[float | None]
    weights: float | None
    answers: float | None
    mirrored: list | None


class Mirrored:
    """Images [N, h, w, 3], left to right; a slice of them is read when it is wanted."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> np.ndarray:
        return self.images[index][:, :, ::-1]


def soup(label: str, folders: list, mirror: bool, **where: Any) -> Soup:
    """The `Soup` of the runs in some folders.

    Args:
      label: what they are called.
      folders: those of runs that differ in their seeds alone.
      mirror: whether mirrored images are looked at, too.
      **where: where the backbone is, see `adapters.backbone`.

    Raises UserError if their adapters, backbone or images are not there any more.
    """
    trained = [adapters.read(folder / "adapter.safetensors") for folder in folders]
    run = trained[0].run
    task, backbone = run_images.task_of(run), adapters.backbone(trained[0], **where)
    images, labels = adapters.images(trained[0], "test")
    shares = metrics.KINDS[task.kind].shares
    views = [images, Mirrored(images)][: 1 + mirror]
    total, each = None, []
    with tqdm(total=len(views) * len(labels) * (len(trained) + 1), unit="img", desc=label) as bar:

        def answered(tuned: adapters.Tuned) -> list[np.ndarray]:
            every = [tuned.every(view, run.eval_batch_size, bar.update) for view in views]
            return [shares(np.float64(logits)) for logits in every]

        for adapter in trained:
            tuned = adapters.load(adapter, backbone)
            each.append(answered(tuned))
            total = tuned.params if total is None else jax.tree.map(np.add, total, tuned.params)
        mean = jax.tree.map(lambda x: x / len(trained), total)
        mixed = answered(tuned._replace(params=mean))
    deviation, middle = task.unit
    labels = np.float64(labels) * deviation + middle if task.kind == "value" else labels
    score = functools.partial(_score, task.kind, labels)
    rows = []
    for pick in (lambda found: found[0], lambda found: np.mean(found, 0))[: 1 + mirror]:
        alone = [score(pick(found)) for found in each]
        rows.append([alone, score(pick(mixed)), score(np.mean([pick(found) for found in each], 0))])
    seeds = [adapter.run.seed for adapter in trained]
    name = metrics.KINDS[task.kind].score
    return Soup(run.task, label, seeds, name, *rows[0], rows[1] if mirror else None)


def _score(kind: str, labels: np.ndarray, shares: np.ndarray) -> float | None:
    """The score of shares [N, C], which are values [N, 1] where a task has values."""
    with np.errstate(divide="ignore"):
        logits = {"class": np.log, "labels": special.logit, "value": np.asarray}[kind](shares)
    logits = logits if kind == "value" else np.clip(logits, -1e9, 1e9)
    found = metrics.KINDS[kind].measure(logits, labels)
    return rows_lib.number(found[metrics.KINDS[kind].score])


def lines(workdirs: list, mirror: bool, **where: Any) -> list[Soup]:
    """A `Soup` for each line with several seeds of finished runs below workdirs.

    Raises UserError if there is none.
    """
    rows = [row for row in rows_lib.find(workdirs) if row["test_acc_final"] is not None]
    groups = [group for group in rows_lib.fold(rows) if len(group) > 1]
    groups = [group for group in groups if group[0].get("epochs_trained") != 0]
    if not groups:
        raise UserError(
            f"no runs in {', '.join(map(str, workdirs))} differ in their seeds alone: train some with "
            f"--config.seeds=(0,1,2)"
        )
    out = []
    for group, name in zip(groups, tables.labels(groups)):
        folders = [_folder(workdirs, row) for row in group]
        out.append(soup(f"{group[0]['task']} {name}", folders, mirror, **where)._replace(label=name))
    return out


def _folder(workdirs: list, row: dict) -> Any:
    """The folder of a row's run."""
    found = [rows_lib.folder(workdir, row) for workdir in workdirs]
    there = [folder for folder in found if (folder / "adapter.safetensors").exists()]
    if not there:
        raise UserError(
            f"there is no adapter of {row['task']} {row['method']} seed {row['seed']} below "
            f"{', '.join(map(str, workdirs))}: name the workdir of its run"
        )
    return there[0]


def markdown(soups: list[Soup]) -> str:
    """The table."""
    mirror = any(s.mirrored for s in soups)
    return tables.markdown([*COLUMNS, *MIRRORED * mirror], [_line(s, mirror) for s in soups], left=2)


def _line(s: Soup, mirror: bool) -> list[str]:
    cells = [s.task, s.label, str(len(s.seeds))]
    for alone, weights, together in [
        (s.alone, s.weights, s.answers),
        *([s.mirrored] if mirror else []),
    ]:
        cells += [tables.scores(s.score, v) for v in (alone, [weights], [together])]
    return cells


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--out", help="folder of the files; default the first WORKDIR")
    parser.add_argument("--mirror", action="store_true", help="looks at mirrored images, too")
    adapters.add_flags(parser)
    args = parser.parse_args()
    workdirs = list(map(files.local, args.workdirs))
    soups = lines(workdirs, args.mirror, **adapters.given(args))
    out = epath.Path(args.out or workdirs[0]).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    text = f"{markdown(soups)}\n\n{CAPTION}"
    files.write(out / "soups.md", text + "\n")
    files.write_json(out / "soups.json", [s._asdict() for s in soups])
    gains = [s.weights - statistics.mean(s.alone) for s in soups if None not in (s.weights, *s.alone)]
    print(f"\n{text}")
    if gains:
        print(f"\nThe mean of weights gains {100 * statistics.mean(gains):+.2f} points on average.")


if __name__ == "__main__":
    one_sentence(main)
