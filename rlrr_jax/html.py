"""One self-contained page of results: `python -m rlrr_jax.html WORKDIR... --out results.html`.

Tables that sort, curves, accuracy of each class, the most confused pairs with pictures, configurations
and versions. It opens without a network: pictures are in the file, and nothing is fetched.
"""

import base64
import html
import io
import json
import pathlib
import re
import string
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from rlrr_jax import adapters, evaluate, files, run_images
from rlrr_jax.errors import Parser, UserError, one_sentence
from rlrr_jax.results import rows as rows_lib
from rlrr_jax.results import tables

MOST_PAIRS = 8  # of confused classes
MOST_PICTURES = 4  # of each pair
SIDE = 64  # pixels of a picture

PAGE = pathlib.Path(__file__).parent / "results" / "page.html"


class Answers(NamedTuple):
    """A run's answers to its held-out images.

    Attributes:
      labels, answers: classes [N].
      pictures: `i -> uint8 [h, w, 3]`.
    """

    labels: Any
    answers: Any
    pictures: Any


def answer(folder: Any, progress: bool = True, **where: Any) -> Answers:
    """The `Answers` of a finished run, from its adapter, backbone and data.

    Args:
      folder: the run's.
      progress: whether to show a bar.
      **where: where the backbone is, see `adapters.backbone`.

    Raises UserError if one of these is not there any more, or not what the run had.
    """
    adapter = adapters.read(folder / "adapter.safetensors")
    run = adapter.run
    images, labels = adapters.images(adapter, run_images.splits(run)[1])
    tuned = adapters.load(adapter, None, **where)
    size, answers = min(run.eval_batch_size, len(labels)), []
    with tqdm(total=len(labels), desc=str(folder), unit="img", disable=not progress) as bar:
        for start in range(0, len(labels), size):
            batch = images[start : start + size]
            logits = tuned.logits(evaluate.pad(batch, size))
            answers.append(np.asarray(logits.argmax(-1))[: len(batch)])
            bar.update(len(batch))
    return Answers(np.asarray(labels), np.concatenate(answers), lambda i: images[i : i + 1][0])


def page(workdirs: list, **options: Any) -> str:
    """The page of all finished runs below workdirs, as text; `options` are those of `answer`."""
    workdirs = list(map(files.local, workdirs))
    rows = rows_lib.find(workdirs)
    if not rows:
        raise UserError(f"there is no finished run in {', '.join(map(str, workdirs))}")
    title = "RLRR results: " + ", ".join(dict.fromkeys(row["task"] for row in rows))
    head, *lines = tables.cells(rows_lib.fold(rows))
    body = [_table(head, lines), f"<p>{_lines(tables.caption(rows))}</p>"]
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
            _picture((folder / "curves.png").read_bytes(), "loss and accuracy by epoch", "curve")
        )
    try:
        answers = answer(folder, **options)
    except UserError as e:
        parts.append(f"<p>Without accuracy of classes: {html.escape(str(e))}</p>")
        print(f"note: {folder} is shown without accuracy of classes: {e}", flush=True)
    else:
        names = adapters.read(folder / "adapter.safetensors").card["classes"]
        parts += [classes(answers, names), pairs(answers, names)]
    config = json.dumps(files.read_json(folder / "config.json"), indent=2)
    parts.append(f"<details><summary>configuration</summary><pre>{html.escape(config)}</pre></details>")
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    backbone = f"backbone {row['backbone']}, SHA-256 {row['backbone_sha256']}"
    parts.append(f"<p>{html.escape('; '.join([versions, row['device'], backbone]))}</p>")
    return "\n".join(parts)


def classes(answers: Any, names: Iterable[str]) -> str:
    """The accuracy of each class."""
    lines = []
    for i, name in enumerate(names):
        mine = answers.labels == i
        right = (answers.answers[mine] == i).mean() if mine.any() else None
        taken = int((answers.answers == i).sum())
        bar = "" if right is None else f'<span class="bar" style="width:{8 * right:.2f}rem"></span>'
        lines.append([name, int(mine.sum()), tables.percent(right), taken, _Raw(bar)])
    total = tables.percent((answers.labels == answers.answers).mean())
    table = _table(["class", "images", "accuracy", "answers", ""], lines)
    return f"<h3>Classes</h3><p>{total} of {len(answers.labels):,} images.</p>{table}"


def pairs(answers: Any, names: Iterable[str]) -> str:
    """The pairs of classes that are confused most, with pictures."""
    wrong = np.flatnonzero(answers.labels != answers.answers)
    if not len(wrong):
        return "<p>No image was classified wrongly.</p>"
    kinds, counts = np.unique(
        np.stack([answers.labels[wrong], answers.answers[wrong]]), axis=1, return_counts=True
    )
    lines = []
    for place in np.argsort(-counts, kind="stable")[:MOST_PAIRS]:
        label, answer = kinds[:, place]
        these = wrong[(answers.labels[wrong] == label) & (answers.answers[wrong] == answer)]
        shown = "".join(
            _picture(_png(answers.pictures(i)), f"image {i}: {names[label]} taken for {names[answer]}")
            for i in these[:MOST_PICTURES]
        )
        lines.append(
            [
                names[label],
                names[answer],
                int(counts[place]),
                _Raw(f'<span class="pair">{shown}</span>'),
            ]
        )
    return "<h3>Most confused</h3>" + _table(["class", "taken for", "images", "some of them"], lines)


class _Raw(str):
    """Text that is HTML already."""


def _table(head, lines):
    top = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>\n" for line in lines)
    return f"<table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def _cell(value):
    if isinstance(value, _Raw):
        return f"<td>{value}</td>"
    text = str(value)
    if match := re.match(
        r"[\d,]*\.?\d+(e[+-]?\d+)?", text
    ):  # "79.05 ± 0.87 %", "18,240", "49 s", "22.5°"
        number = float(match[0].replace(",", ""))
        return f'<td class="n" data-v="{number!r}">{html.escape(text)}</td>'
    return f"<td>{html.escape(text)}</td>"


def _picture(data, what, kind=""):
    text = base64.b64encode(data).decode()
    what = html.escape(what, quote=True)
    return f'<img class="{kind}" alt="{what}" title="{what}" src="data:image/png;base64,{text}">'


def _png(image):
    out, image = io.BytesIO(), Image.fromarray(image)
    if image.width > SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _lines(text):
    return "<br>".join(html.escape(text).splitlines())


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
