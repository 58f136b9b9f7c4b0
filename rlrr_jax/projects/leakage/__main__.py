"""What gradients give away: `python -m rlrr_jax.projects.leakage WORKDIR...`, for runs of one task.

Writes `leakage.json` (all numbers), `leakage.md` (tables, and how to read them) and, with `--invert`,
pictures of true and recovered images.
"""

import argparse
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from rlrr_jax import adapters, cards, checks, files, methods, run_images
from rlrr_jax.adapters import Adapter
from rlrr_jax.data import crops
from rlrr_jax.data.resize import normalize
from rlrr_jax.errors import Parser, UserError, one_sentence
from rlrr_jax.projects.leakage import defences, gradients, inversion
from rlrr_jax.projects.leakage.gradients import Client
from rlrr_jax.results import plots, rows, tables

STATES = ("start", "trained")
PARTS = ("adapter", "head", "both")
COLUMNS = ["run", "gradient at", "batch", "defence", *(f"{part}: top-1, MRR" for part in PARTS)]
TEXT = """\
# What gradients give away

An honest server sees the gradient of one batch and knows the model, the method and the values at which
it was taken. {task}, {size} pixels, {candidates} candidates (test images, seed {seed}),
{probes} batches of each size, {seconds:.0f} s.

## Whose gradient is it?

For each image of a batch: its rank among all candidates by the cosine of their gradients with the
shared one. **top-1** is the share of images ranked first, **MRR** the mean reciprocal rank; guessing
has {chance}. An attacker who knows the label alone, which the head's gradient gives away, has {label}.
The gradient of the adapter alone is what is shared where the head is withheld. What a defence costs in
accuracy is seen by training with it, config.gradients.

{table}

At the start the head is zero, and with it every gradient but the head's own. **noise** clips the
norm to 1 and adds noise of that many times that norm, **prune** sets so many percent of the values
to zero, the smallest.

## Exact leaks

Of a single image the head's gradient gives the label and the features before the head, by division:

{exact}
{inversion}"""
INVERTED = """
## Images from gradients

{count} images, {steps} steps of Adam on signs, cosine distance and {variation} times the total
variation, {restarts} beginning(s), with the gradient of the head. Higher is nearer; what helps
the attacker is what lies above the baselines, which need no gradient: the mean of the candidates, and
the nearest of them.

{table}

![true and recovered images](leakage.png)
"""


class Case(NamedTuple):
    """A run, as an attacker sees it.

    Attributes:
      label: name of the run in tables.
      clients: state of `STATES` -> `Client`.
    """

    label: str
    clients: dict[str, Client]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = _arguments(argv)
    begun = time.monotonic()
    found = [path for run in args.runs for path in adapters.finished(files.local(run))]
    if not found:
        raise UserError(f"there is no finished run in {', '.join(args.runs)}: give a --workdir")
    first = adapters.read(found[0])
    run = first.run
    # A misfit is said before any work.
    cases = [_case(path, run, args.precision, adapters.given(args)) for path in found]
    known = images, labels = _candidates(first, args.candidates, args.seed)
    batches = _batches(len(labels), args.batches, args.probes, args.seed)
    results: dict[str, list] = {"reidentification": [], "exact": [], "inversion": []}
    pictures = []
    for case in cases:
        for state, client in case.clients.items():
            results["reidentification"] += reidentify(case.label, state, client, known, batches)
        exact = exact_leaks(case.clients["trained"], images, labels, args.probes)
        results["exact"].append({"run": case.label, **exact})
        if args.invert:
            attack = inversion.Attack(steps=args.steps, restarts=args.restarts)
            numbers, shown = invert(case, attack, known, args.invert, args.seed)
            results["inversion"].append(numbers)
            pictures.append((case.label, shown))
    facts = dict(task=run.task, size=run.image_size, seconds=time.monotonic() - begun, **vars(args))
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_json(args.out / "leakage.json", {**results, "facts": {**facts, "out": str(args.out)}})
    text = page(results, facts, labels)
    files.write(args.out / "leakage.md", text)
    if pictures:
        plots.save(args.out / "leakage.png", draw, pictures)
    print(f"{text}\nwritten to {args.out}", flush=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m rlrr_jax.projects.leakage", description=__doc__)
    parser.add_argument("runs", nargs="+", help="workdirs or folders of finished runs of one task")
    several = lambda text: [_whole(part) for part in text.split(",")]
    parser.add_argument("--candidates", type=_whole, default=1000)
    parser.add_argument("--probes", type=_whole, default=8, help="batches of each size")
    parser.add_argument("--batches", type=several, default=[1, 4, 8], help="sizes of batches: 1,4,8")
    parser.add_argument("--invert", type=_natural, default=0, help="how many images to recover")
    parser.add_argument("--steps", type=_whole, default=400, help="of each recovery")
    parser.add_argument("--restarts", type=_whole, default=1)
    parser.add_argument("--seed", type=_natural, default=0)
    precisions = checks.CHOICES["precision"]
    parser.add_argument("--precision", choices=precisions, default="highest", help="of matmuls")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("leakage"))
    adapters.add_flags(parser)
    args = parser.parse_args(argv)
    for flag in ("invert", "batches"):
        if (most := np.max(getattr(args, flag))) > args.candidates:
            raise UserError(
                f"--{flag}={most} is more than the {args.candidates} candidates: ask for fewer"
            )
    return args


def _natural(text: str, least: int = 0) -> int:
    """A number of a flag; an error, which argparse shows, below the least."""
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return int(text)


_whole = functools.partial(_natural, least=1)


def _candidates(adapter: Adapter, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Test images [n, h, w, 3] in [-1, 1] and their labels."""
    run, (images, labels) = adapter.run, adapters.images(adapter, "test")
    if number > len(labels):
        raise UserError(
            f"--candidates={number} is more than the {len(labels)} test images there are: ask for fewer"
        )
    index = np.random.default_rng(seed).permutation(len(labels))[:number]
    chosen = np.stack([np.asarray(images[int(i) : int(i) + 1])[0] for i in index])
    crop_from = run.crop_from if run.crop == crops.SQUARE else None
    resized = jax.jit(lambda x: normalize(x, run_images.size_of(run), crop_from))
    parts = [np.asarray(resized(chosen[i : i + 64])) for i in range(0, number, 64)]
    return np.concatenate(parts), np.asarray(labels)[index].astype(np.int32)


def _batches(number: int, sizes: list[int], probes: int, seed: int) -> list[np.ndarray]:
    """Numbers of the candidates in each shared batch."""
    rng = np.random.default_rng(seed + 1)
    return [rng.choice(number, size, replace=False) for size in sizes for _ in range(probes)]


def _case(path: Any, first: ConfigDict, precision: str, where: dict) -> Case:
    adapter = adapters.read(path)
    run = ConfigDict(adapter.card["config"])
    for key in ("task", "image_size"):
        if run[key] != first[key]:
            raise UserError(
                f"{path} is a run with {key}={run[key]}, the first with {first[key]}: give runs alike"
            )
    if run.loss != "cross_entropy":
        raise UserError(
            f"{path} was trained with config.loss={run.loss}, whose gradient is not the one attacked "
            f"here: give runs with cross_entropy"
        )
    backbone = adapters.backbone(adapter, **where)
    how = cards.model(adapter), cards.method(adapter), backbone.frozen
    client = Client(*how, adapter.trainable, precision)
    label = tables.label([rows.read(path.parent / "result.json")])
    if methods.asks_training(client.method):
        print(f"{label}: starts from gradients of the data, and is attacked after training only")
        return Case(label, {"trained": client})
    key = jax.random.split(jax.random.key(run.seed), 3)[0]
    head = jax.tree.map(np.zeros_like, adapter.trainable["head"])
    start = methods.start(client.method, key, {**backbone.frozen, "head": head})
    return Case(label, {"start": client._replace(trainable=start), "trained": client})


def reidentify(label: str, state: str, client: Client, known: tuple, batches: list) -> list[dict]:
    """Rows of ranks: of each size of batch, behind each defence."""
    images, labels = known
    shared = gradients.compiled(client, gradients.gradient)
    plain = [jax.device_get(shared(images[batch], labels[batch])) for batch in batches]
    probes = {("none", i): tree for i, tree in enumerate(plain)}
    for name, defence in defences.DEFENCES.items():
        defend = jax.jit(functools.partial(defences.defend, defence))
        for i, tree in enumerate(plain):
            probes[name, i] = jax.device_get(defend(jax.random.key(i), tree))
    with tqdm(total=len(images), unit="img", desc=f"{label}, {state}", delay=2) as bar:
        cosines = gradients.similarities(client, list(probes.values()), images, labels, bar.update)
    groups: dict[tuple, dict[str, list]] = {}
    for j, (defence, i) in enumerate(probes):
        ranks = groups.setdefault((len(batches[i]), defence), {part: [] for part in PARTS})
        for part, values in zip(PARTS, cosines[:, :, j]):
            ranks[part].append(gradients.ranks(values, batches[i]))
    return [
        {
            **{"run": label, "gradient at": state, "batch": size, "defence": defence},
            **{part: gradients.scores(np.concatenate(ranks[part])) for part in PARTS},
        }
        for (size, defence), ranks in groups.items()
    ]


def exact_leaks(client: Client, images: Any, labels: Any, number: int) -> dict[str, float]:
    """How many labels the head's gradient gives away, and the relative error of its features."""
    model = client.model.clone(num_classes=1)
    params = methods.merge(client.method, client.frozen, client.trainable)
    width = len(params["head"]["kernel"])
    # A head of one row for each input passes the features on.
    params = {**params, "head": {"kernel": np.eye(width), "bias": np.zeros(width)}}
    features = jax.jit(model.clone(num_classes=width).apply)
    shared = gradients.compiled(client, gradients.gradient)
    right, errors = [], []
    for image, y in zip(images[:number], labels[:number]):
        head = jax.device_get(shared(image[None], y[None])["head"])
        right.append(gradients.label(head) == y)
        with jax.default_matmul_precision(client.precision):
            true = np.asarray(features({"params": params}, image[None]))[0]
        errors.append(np.linalg.norm(gradients.feature(head) - true) / np.linalg.norm(true))
    return {"labels": float(np.mean(right)), "feature error": float(np.median(errors))}


def invert(case: Case, attack: Any, known: tuple, number: int, seed: int) -> tuple[dict, list]:
    """PSNR and SSIM of images recovered after training, and the images (true, recovered)."""
    (images, labels), client = known, case.clients["trained"]
    recover = lambda client, *args: inversion.invert(client, attack, *args, images[0].shape)
    attacked = gradients.compiled(client, recover)
    shared = gradients.compiled(client, gradients.gradient)
    measured, shown = [], []
    for i in tqdm(range(number), unit="img", desc=f"{case.label}, recovered", delay=2):
        seen = shared(images[i][None], labels[i][None])
        found, _ = attacked(seen, labels[i], jax.random.fold_in(jax.random.key(seed), i))
        guesses = {"recovered": np.asarray(found)}
        guesses |= inversion.baselines(images[i], np.delete(images, i, 0))
        measures = {"PSNR": inversion.psnr, "SSIM": inversion.ssim}
        measured.append(
            {f"{k} {name}": f(x, images[i]) for k, f in measures.items() for name, x in guesses.items()}
        )
        shown.append((images[i], guesses["recovered"]))
    return {
        "run": case.label,
        **{k: float(np.mean([row[k] for row in measured])) for k in measured[0]},
    }, shown


def draw(pictures: list[tuple[str, list]]) -> bytes:
    """True images in the first row, and those of each run below them."""
    lines = [("true", [true for true, _ in pictures[0][1]])]
    lines += [(name, [found for _, found in pairs]) for name, pairs in pictures]
    number = len(lines[0][1])
    figure, axes = plots.subplots(len(lines), number, (1.1 * number, 1.2 * len(lines)))
    for (name, several), line in zip(lines, axes):
        for image, axis in zip(several, line):
            axis.imshow(np.clip(image / 2 + 0.5, 0, 1))
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, fontsize=7)
    return plots.png(figure)


def page(results: dict, facts: dict, labels: np.ndarray) -> str:
    """The text of `leakage.md`."""
    counts = np.bincount(labels)[labels]
    harmonic = lambda n: (1 / np.arange(1, n + 1)).sum() / n
    guess = lambda counts: (np.mean(1 / counts), np.mean([harmonic(n) for n in counts]))
    pair = lambda top1, mrr: f"{top1:.3f}, {mrr:.3f}"
    rows = [
        [*(row[k] for k in COLUMNS[:4]), *(pair(row[p]["top1"], row[p]["mrr"]) for p in PARTS)]
        for row in results["reidentification"]
    ]
    exact = [[r["run"], f"{r['labels']:.0%}", f"{r['feature error']:.1e}"] for r in results["exact"]]
    text = ""
    if results["inversion"]:
        keys = list(results["inversion"][0])
        cells = [[r["run"], *(f"{r[k]:.2f}" for k in keys[1:])] for r in results["inversion"]]
        attack = inversion.Attack()
        text = INVERTED.format(
            table=tables.markdown(keys, cells),
            count=facts["invert"],
            variation=attack.variation,
            **{key: facts[key] for key in ("steps", "restarts")},
        )
    return TEXT.format(
        **facts,
        chance=pair(*guess(np.array([len(labels)]))),
        label=pair(*guess(counts)),
        table=tables.markdown(COLUMNS, rows),
        exact=tables.markdown(["run", "labels found", "error of the features"], exact),
        inversion=text,
    )


if __name__ == "__main__":
    one_sentence(main)
