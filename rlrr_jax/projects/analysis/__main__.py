"""What tuning changed: `python -m rlrr_jax.projects.analysis WORKDIR...` looks at every kernel.

Writes `analysis.json` (all numbers), `analysis.md` (tables, figures and how to read them) and PNG
figures. After section 3 of the paper: singular values, and where singular vectors point, before (W) and
after (W').
"""

import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.linalg
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from rlrr_jax import adapters, files
from rlrr_jax.errors import Parser, UserError, one_sentence
from rlrr_jax.methods import base
from rlrr_jax.methods.sites import block_numbers, stack_of
from rlrr_jax.projects.analysis import figures
from rlrr_jax.results import plots, tables

LEADING = 8  # singular vectors whose span is compared
MOST_RUNS = 6  # in one figure
COLUMNS = ["run", "changed", "change", "effective rank", "left turn", "right turn", "spectrum"]

TEXT = """\
# What tuning changed

W is a pretrained kernel `[in, out]`, W' the same kernel after tuning, all of it folded in; blocks count
from 1. Singular values are in descending order.

{table}

Means over all {number} kernels.

- **change**: `|W' - W| / |W|`, Frobenius norms. RLRR's own start is not the identity: part of
  its change was there before training (about 7 % at width 768, 20 % at width 96).
- **effective rank** of `W' - W`: `exp(entropy of its singular values, normalised to sum 1)` (Roy and
  Vetterli, 2007). One direction has 1, {most} equal ones have {most}. LoRA of rank r has at most r; a
  rescaled kernel (RLRR) changes in as many directions as W has.
- **turn**: mean principal angle, in degrees, between the spans of the {leading} leading singular
  vectors of W and of W'; left vectors live in the inputs, right ones in the outputs. 0 is the same
  span, 90 an unrelated one. Where singular values {leading} and {next} are close, little
  change turns much. SSF, which scales outputs, can turn right vectors more than left ones; RLRR scales
  both sides.
- **spectrum**: `|s' - s| / |s|` of the two lists of singular values: how much of the change is in sizes
  rather than in directions.

{figures}
The numbers of every kernel, both spectra, and mean, standard deviation and quantiles of everything that
was trained are in `analysis.json`.
"""
FIGURES = {
    "change.png": "Relative change of each kernel in percent; one panel for each run.",
    "rank.png": "Effective rank of the change by depth. The grey line is the most a kernel could have.",
    "turn.png": "How far the leading singular subspaces turn: left (solid) and right (dashed).",
    "spectra.png": "Singular values of W (black) and of W' in the middle block, and their ratio.",
    "scales.png": "Learnt scales by depth: mean and standard deviation over their entries.",
}


def svd(matrix: Any, k: int) -> tuple:
    """Singular values, descending, and the k leading left [in, k] and right [out, k] singular vectors.

    From the eigenvectors of the smaller Gram matrix in float64: several times faster than a full SVD,
    and exact to about 1e-8 of the largest singular value.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape[0] > matrix.shape[1]:
        values, right, left = svd(matrix.T, k)
        return values, left, right
    squares, vectors = scipy.linalg.eigh(matrix @ matrix.T, driver="evd")
    values = np.sqrt(np.maximum(squares[::-1], 0))
    left = vectors[:, ::-1][:, :k]
    right = matrix.T @ left / np.maximum(values[:k], np.finfo(float).tiny)
    return values, left, right


def effective_rank(values: Any) -> float:
    """`exp(entropy)` of singular values normalised to sum 1; 0 of nothing."""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def compare(kernel: Any, tuned: Any, k: int = LEADING) -> dict:
    """The numbers of one kernel [in, out] before and after; of an unchanged one all are exactly 0."""
    k = min(k, *kernel.shape)
    values, left, right = svd(kernel, k)
    if np.array_equal(kernel, tuned):
        zeros = ("relative_change", "effective_rank", "left_turn", "right_turn", "spectrum_change")
        return {**dict.fromkeys(zeros, 0.0), "values": _short(values), "tuned_values": _short(values)}
    tuned_values, tuned_left, tuned_right = svd(tuned, k)
    change = np.asarray(tuned, np.float64) - kernel
    degrees = lambda a, b: float(np.degrees(scipy.linalg.subspace_angles(a, b)).mean())
    return {
        "relative_change": float(np.linalg.norm(change) / np.linalg.norm(kernel)),
        "effective_rank": effective_rank(np.sqrt(np.maximum(_squares(change), 0))),
        "left_turn": degrees(left, tuned_left),
        "right_turn": degrees(right, tuned_right),
        "spectrum_change": float(np.linalg.norm(tuned_values - values) / np.linalg.norm(values)),
        "values": _short(values),
        "tuned_values": _short(tuned_values),
    }


def _squares(matrix):
    """Squares of singular values; rounding of zeros, about 1e-16 of the largest, is cut off."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    squares = scipy.linalg.eigh(gram, eigvals_only=True)
    return np.where(squares > 1e-14 * squares.max(), squares, 0)


def _short(values):
    return [float(f"{x:.6g}") for x in values]


def kernels(params: Any) -> dict:
    """`{(name, block): kernel [in, out]}` of the Dense layers of all blocks, numbered from 0."""
    numbers = block_numbers(params)
    if not numbers:
        return _convolutions(params)
    return {
        (name.rpartition(".")[2], block): kernel
        for name, site in base.dense(params).items()
        for block, kernel in zip(
            numbers[stack_of(site.path)], np.asarray(base.weights(params, site)[0])
        )
    }


def _convolutions(params):
    """Kernels of convolutions as matrices of (in, column) by (out, row), numbered by depth."""
    found = [site for site in base.sites(params) if site.role == "conv"]
    found.sort(
        key=lambda site: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", "/".join(site.path))]
    )
    kernels = (np.asarray(base.subtree(params, site.path)["kernel"]) for site in found)
    matrix = lambda x: x.transpose(2, 1, 3, 0).reshape(x.shape[2] * x.shape[1], -1)
    return {("conv", i): matrix(kernel) for i, kernel in enumerate(kernels)}


def analyze(adapter: Any, frozen: Any, tell: Callable = lambda: None) -> dict:
    """All numbers of an adapter: `{"kernels": [...], "trained": [...]}`, plain values.

    Args:
      adapter: an `adapters.Adapter`.
      frozen: the tree of its backbone.
      tell: called after each kernel.
    """
    params = adapters.merged(adapter, frozen)
    before, after = kernels(frozen), kernels(params)

    def one(key):
        row = {"kernel": key[0], "block": key[1] + 1, **compare(before[key], after[key])}
        tell()
        return row

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # LAPACK releases the lock
        rows = list(pool.map(one, before))
    return {"kernels": rows, "trained": list(_trained(adapter.trainable["adapter"]))}


def _trained(tree):
    """Statistics of each trained leaf outside the head, of each block where it has blocks."""
    for name, leaf in flatten_dict(tree, sep="/").items():
        blocks = (
            enumerate(np.asarray(leaf), 1) if "encoderblock" in name else [(None, np.asarray(leaf))]
        )
        for block, values in blocks:
            yield {
                "name": name,
                "block": block,
                "mean": float(values.mean()),
                "std": float(values.std()),
                "quantiles": _short(np.quantile(values, [0, 0.25, 0.5, 0.75, 1])),
            }


def find(workdirs: list) -> dict:
    """`{label: path}` of the adapters of finished runs; of several seeds the first."""
    found, seen = {}, set()
    for workdir in map(files.local, workdirs):
        for path in [workdir] if workdir.is_file() else adapters.finished(workdir):
            card = adapters.read(path).card
            same = [{**card["config"], "seed": 0}, card["backbone_sha256"]]
            same = json.dumps(same, sort_keys=True)
            if same in seen and not workdir.is_file():
                print(f"left out: {path} (another seed of a run that is shown)")
                continue
            seen.add(same)
            options = [f"{k}={v}" for k, v in card["method_kwargs"].items()]
            trial = filter(None, [card["config"].get("trial")])
            label = " ".join([card["task"], card["method"], *options, *trial])
            found[f"{label} ({path})" if label in found else label] = path
    if not found:
        raise UserError(f"there is no finished run in {', '.join(map(str, workdirs))}")
    return found


def summary(found: dict) -> str:
    """The table: a line for each run, means over its kernels."""
    lines = []
    for label, numbers in found.items():
        rows = numbers["kernels"]
        mean = lambda key, rows=rows: np.mean([row[key] for row in rows])
        changed = sum(row["relative_change"] > 0 for row in rows)
        lines.append([label, f"{changed} of {len(rows)}", f"{100 * mean('relative_change'):.2f} %"])
        lines[-1] += [f"{mean('effective_rank'):.1f}", f"{mean('left_turn'):.1f}°"]
        lines[-1] += [f"{mean('right_turn'):.1f}°", f"{100 * mean('spectrum_change'):.2f} %"]
    return tables.markdown(COLUMNS, lines)


def write(folder: Any, found: dict) -> None:
    """Writes the numbers, the figures and the page of `{label: analyze(...)}` into a folder."""
    folder = files.local(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "analysis.json", found)
    shown = dict(list(found.items())[:MOST_RUNS])
    text = ""
    for name in FIGURES:
        draw = getattr(figures, name.removesuffix(".png"))
        if plots.save(folder / name, draw, shown):
            text += f"{FIGURES[name]}\n\n![{FIGURES[name]}]({name})\n\n"
    if len(found) > MOST_RUNS:
        text += f"Figures show the first {MOST_RUNS} of {len(found)} runs: name fewer for others.\n\n"
    rows = next(iter(found.values()))["kernels"]
    names = dict(leading=LEADING, next=LEADING + 1, number=len(rows), most=len(rows[0]["values"]))
    files.write(folder / "analysis.md", TEXT.format(table=summary(found), figures=text, **names))


def main() -> None:
    """The command."""
    parser = Parser(prog="python -m rlrr_jax.projects.analysis", description=__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="or an adapter.safetensors")
    parser.add_argument("--out", help="folder of the files; default WORKDIR/analysis")
    adapters.add_flags(parser)
    args = parser.parse_args()
    first = files.local(args.workdirs[0])
    out = args.out or (first.parent if first.is_file() else first) / "analysis"
    begun = time.monotonic()
    paths, found = find(args.workdirs), {}
    read = {label: adapters.read(path) for label, path in paths.items()}
    backbone = adapters.backbone(next(iter(read.values())), **adapters.given(args))
    for label, adapter in read.items():
        if not adapters.fits(adapter, backbone):
            raise UserError(
                f"{label} ({paths[label]}) has another backbone than the first: leave it out"
            )
    for label, adapter in read.items():
        with tqdm(total=len(kernels(backbone.frozen)), desc=label, unit="kernel") as bar:
            found[label] = analyze(adapter, backbone.frozen, bar.update)
    write(out, found)
    print(summary(found))
    print(f"files: {out} ({time.monotonic() - begun:.0f} s)")


if __name__ == "__main__":
    one_sentence(main)
