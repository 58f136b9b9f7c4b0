"""One self-contained page of results: `python -m rlrr_jax.html WORKDIR... --out results.html`.

Tables that sort, curves, accuracy of each class, the confusion matrix, the most confused pairs with
pictures, how sure answers are, configurations and versions. It opens without a network: pictures are in
the file, and nothing is fetched.
"""

import html
import json
import pathlib
import string
from typing import Any

import numpy as np
from tqdm import tqdm

from rlrr_jax import adapters, cards, files, metrics, run_images
from rlrr_jax.errors import Parser, UserError, one_sentence
from rlrr_jax.results import rows as rows_lib
from rlrr_jax.results import sections, tables
from rlrr_jax.results.elements import SIDE, lines, picture, table
from rlrr_jax.results.sections import Answers

PAGE = pathlib.Path(__file__).parent / "results" / "page.html"


def answer(folder: Any, progress: bool = True, **where: Any) -> Answers:
    """The `Answers` of a finished run, from its adapter, backbone and data.

    Args:
      folder: the run's.
      progress: whether to show a bar.
      **where: where the backbone is, see `adapters.backbone`.

    Raises UserError if one of these is not there any more, or not what the run had.
    """
    adapter = adapters.read(folder / "adapter.safetensors")
    run, card = adapter.run, adapter.card
    split = run_images.tested(run) or run_images.splits(run)[1]
    images, labels = adapters.images(adapter, split)
    tuned, task = adapters.load(adapter, None, **where), run_images.task_of(run)
    with tqdm(total=len(labels), desc=str(folder), unit="img", disable=not progress) as bar:
        logits = tuned.every(images, run.eval_batch_size, bar.update)
    said, (deviation, mean) = cards.answers(card), task.unit
    labels = np.float64(labels) * deviation + mean if task.kind == "value" else labels
    shares = metrics.KINDS[task.kind].shares(logits)
    given = np.array(said["thresholds"]), lambda i: images[i : i + 1][0]
    return Answers(task.kind, np.asarray(labels), shares, card["classes"], *given)


def page(workdirs: list, **options: Any) -> str:
    """The page of all finished runs below workdirs, as text; `options` are those of `answer`."""
    workdirs = list(map(files.local, workdirs))
    rows = rows_lib.find(workdirs)
    if not rows:
        raise UserError(f"there is no finished run in {', '.join(map(str, workdirs))}")
    title = "RLRR results: " + ", ".join(dict.fromkeys(row["task"] for row in rows))
    head, *cells = tables.cells(rows_lib.fold(rows))
    body = [table(head, cells), f"<p>{lines(tables.caption(rows))}</p>"]
    groups = rows_lib.fold(rows)
    for group, name in zip(groups, tables.labels(groups)):
        folder = _folder(workdirs, group[0])
        body.append(section(group, name, folder, **options))
    page = string.Template(PAGE.read_text())
    return page.substitute(title=html.escape(title), body="\n".join(body), side=SIDE)


def _folder(workdirs, row):
    """The folder of a row's run."""
    for workdir in workdirs:
        folder = rows_lib.folder(workdir, row)
        if (folder / "result.json").exists():
            if files.read_json(folder / "result.json")["identity"] == row["identity"]:
                return folder
    raise UserError(
        f"the folder of {row['task']} {row['method']} seed {row['seed']} has gone: start again"
    )


def section(group: list[dict], name: str, folder: Any, **options: Any) -> str:
    """All about one setting: curves, classes, confusions of its first seed; configuration."""
    row = group[0]
    seed = f", seed {row['seed']}" if len(group) > 1 else ""
    parts = [f"<h2>{html.escape(row['task'] + ' ' + name)}{seed}</h2>"]
    if (folder / "curves.png").exists():
        parts.append(
            picture((folder / "curves.png").read_bytes(), "loss and accuracy by epoch", "curve")
        )
    if row.get("epochs_trained") == 0:
        chosen = ", ".join(f"{key}={value}" for key, value in row.get("chosen", {}).items())
        parts.append(f"<p>Nothing was trained ({html.escape(chosen)}), and no adapter is there.</p>")
        return "\n".join([*parts, *_ends(folder, row)])
    try:
        answers = answer(folder, **options)
    except UserError as e:
        parts.append(f"<p>Without accuracy of classes: {html.escape(str(e))}</p>")
        print(f"note: {folder} is shown without accuracy of classes: {e}")
    else:
        parts += sections.of(answers)
    return "\n".join([*parts, *_ends(folder, row)])


def _ends(folder: Any, row: dict) -> list[str]:
    """A run's configuration and versions."""
    config = json.dumps(files.read_json(folder / "config.json"), indent=2)
    parts = [f"<details><summary>configuration</summary><pre>{html.escape(config)}</pre></details>"]
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    backbone = f"backbone {row['backbone']}, SHA-256 {row['backbone_sha256']}"
    parts.append(f"<p>{html.escape('; '.join([versions, row['device'], backbone]))}</p>")
    return parts


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--out", help="the file; default WORKDIR/results.html")
    adapters.add_flags(parser)
    args = parser.parse_args()
    out = files.local(args.out or files.local(args.workdirs[0]) / "results.html")
    if args.out:
        files.writable(out)  # before the work, not after it
    text = page(args.workdirs, **adapters.given(args))
    files.write(out, text)
    print(f"{out}: {len(text) / 1e6:.1f} MB, opens in any browser")


if __name__ == "__main__":
    one_sentence(main)
