"""Many runs: tasks x methods x seeds. What they cost, what failed, and the table at the end."""

import contextlib
import functools
import math
import time
import traceback
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from rlrr_jax import config as config_lib
from rlrr_jax import files, pretrained, report, train
from rlrr_jax.data import sources, store, tasks
from rlrr_jax.errors import UserError, first_line


class Work(NamedTuple):
    """A run, its folder, its data, and how it is called on the screen."""

    run: Any
    folder: Any
    found: sources.Found
    label: str


def run(config, workdir=None):
    """Trains and evaluates all runs of a configuration.

    Runs that are finished in the workdir are not repeated; an interrupted one goes on; where there
    are several tasks, one that fails does not stop the others.

    Returns:
      The rows of `results.json` of this configuration, and what failed: a run's label -> why.

    Raises:
      UserError: for anything the user can mend, before any work where that can be seen; of a single
        task at once, of several only if none of them can run.
    """
    runs = config_lib.resolve(config)
    workdir = epath.Path(workdir or f"runs/{config_lib.fingerprint(runs)}").expanduser()
    problems = {}
    survive = functools.partial(_survive, problems, alone=len({r.task for r in runs}) == 1)
    works = _locate(runs, workdir, survive)
    if not works:
        raise UserError(f"no task can run; {explain(problems)[0]}")
    places = {(w.run.pretrained.name, w.run.pretrained.cache_dir) for w in works}
    weights = {name: pretrained.fetch(name, cache_dir) for name, cache_dir in places}
    for work in works:
        check_folder(work, weights[work.run.pretrained.name][1])
    _check_weights(works[0].run, weights)
    print(f"workdir: {workdir}", flush=True)
    forecast = Forecast(works)

    load_data = functools.lru_cache(8)(_load_data)  # the runs of a task share its images
    rows = []
    for work in works:
        with survive(work), files.lock(work.folder):
            chosen = choose(work, weights, load_data, forecast)
            rows.append(finish(chosen, weights, load_data, forecast))
    if not rows:
        raise UserError(f"every run failed; {explain(problems)[0]}")
    everything = report.collect(workdir)
    if len(everything) <= report.MOST_CURVES:
        report.all_curves(workdir, everything)
    return rows, problems


def explain(problems):
    """A line for each reason why runs failed: `"kitti rlrr seed 0, kitti rlrr seed 1: why"`."""
    labels = {}
    for label, why in problems.items():
        labels.setdefault(why, []).append(label)
    return [f"{', '.join(of)}: {why}" for why, of in labels.items()]


def _locate(runs, workdir, survive):
    """The runs whose data is there, as `Work`; checks the space their images need."""
    works, entries = [], []
    entry = functools.cache(store.locate)  # the runs of a task share it
    for r in runs:
        folder = workdir / r.task / r.method / f"seed{r.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        work = Work(r, folder, None, f"{r.task} {r.method} seed {r.seed}")
        with survive(work):
            if found := _before(r, folder):  # its data may be gone
                works.append(work._replace(found=found))
                continue
            found = config_lib.locate(r)
            where = (r.image_size, r.data.variant, found, r.data.cache_dir)
            if found.kind != "bundled":
                parts = {*train.splits(r), *(("train800", "val200") if r.protocol == "vtab" else ())}
                entries += [entry(r.task, part, *where) for part in sorted(parts)]
            works.append(work._replace(found=found))
    if wanted := store.missing_bytes(entries):
        print(f"decoded images to write: {wanted / 1e9:.2f} GB", flush=True)
        store.check_space(wanted, runs[0].data.cache_dir)
    return works


def _before(run, folder):
    """Where the data of a finished run came from, which is filled in; None if it is not finished."""
    if not (folder / "result.json").exists() or not (folder / "config.json").exists():
        return None
    saved = files.read_json(folder / "config.json")
    for key in ("source", "variant"):
        if run.data[key] is None or run.data[key] == saved["data"][key]:
            run.data[key] = saved["data"][key]
    return sources.Found(saved["data"]["source"], None, saved["dataset"])


def _check_weights(run, weights):
    """UserError if weights do not fit the model: that is no task's fault."""
    model, path = config_lib.build_model(run), weights[run.pretrained.name][0]
    pretrained.load(path, model=model, image_size=run.image_size, grid=run.pretrained.grid)


@contextlib.contextmanager
def _survive(problems, work, alone):
    """Notes what goes wrong with a run, in `error.txt` too, and goes on; raises it if `alone`."""
    path = work.folder / "error.txt"
    try:
        yield
        path.unlink(missing_ok=True)
    except Exception as e:
        if alone:
            raise
        expected = isinstance(e, UserError | OSError)
        problems[work.label] = str(e) if expected else f"{type(e).__name__}: {first_line(e)} ({path})"
        files.write(path, problems[work.label] if expected else traceback.format_exc())
        if problems[work.label] not in [*problems.values()][:-1]:  # once for all seeds
            print(f"{work.label}: failed: {problems[work.label]}", flush=True)


def finish(work, weights, load_data, forecast):
    """The row of a run, which is trained if it has not been."""
    path, sha256 = weights[work.run.pretrained.name]
    check_folder(work, sha256)
    result = work.folder / "result.json"
    if result.exists():
        if work.folder.parent.name != "search":
            print(f"{forecast.place(work)}: finished before", flush=True)
    else:
        r, marks = work.run, _marks(work, sha256)
        load = lambda split: load_data(
            r.task, split, r.image_size, r.data.variant, work.found, r.data.cache_dir
        )
        tell = functools.partial(forecast.tell, work)
        train.train_one(r, work.folder, forecast.place(work), path, marks, load, tell)
    forecast.finished(work)
    return files.read_json(result)


def choose(work, weights, load_data, forecast):
    """A run of the protocol "vtab" with its hyper-parameters, the best of the grid on val200.

    Ties go to the smaller learning rate, then weight decay, then drop path. Others are returned as
    they are.
    """
    if work.run.protocol != "vtab":
        return work
    rows = []
    for trial in trials(work):
        with contextlib.ExitStack() as stack:
            trial.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.lock(trial.folder))
            rows.append(finish(trial, weights, load_data, forecast))
    best = min(rows, key=lambda row: (-row["val_acc"], *(row[key] for key in config_lib.GRID)))
    run = ml_collections.ConfigDict(work.run.to_dict())
    run.update({key: best[key] for key in config_lib.GRID})
    run.val_acc = best["val_acc"]
    return work._replace(run=run)


def trials(work):
    """The runs on 800 and 200 images that a run of the protocol "vtab" chooses from; all of seed 0."""
    out = []
    for run in config_lib.trials(work.run):
        run.seed = 0
        name = "-".join(["seed0", *(f"{key}{run[key]:g}" for key in config_lib.GRID)])
        folder = work.folder.parent / "search" / name
        out.append(Work(run, folder, work.found, f"{run.task} {run.method} {name}"))
    return out


def check_folder(work, sha256):
    """UserError if another run is in a folder."""
    path = work.folder / "config.json"
    if not path.exists():
        return
    old, new = (
        config_lib.identity(ml_collections.ConfigDict(c))
        for c in (files.read_json(path), {**work.run.to_dict(), **_marks(work, sha256)})
    )
    if any(new[key] is None for key in config_lib.GRID):  # "vtab" has not chosen yet
        for values in (old, new):
            for key in (*config_lib.GRID, "val_acc"):
                values.pop(key, None)
    if changed := config_lib.differences(old, new):
        raise UserError(
            f"{work.folder} holds a run with {', '.join(changed)}: choose another --workdir, or "
            f"delete that folder"
        )


def _marks(work, sha256):
    return {"backbone_sha256": sha256, "dataset": work.found.dataset}


def _load_data(task, split, size, variant, found, cache_dir):
    return store.load_split(task, split, size, variant, found, cache_dir)


# What it costs --------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Work of runs: steps, training images, evaluations, evaluated images."""

    steps: int = 0
    images: int = 0
    evaluations: int = 0
    evaluated: int = 0

    def plus(self, other):
        return Cost(*(a + b for a, b in zip(self, other)))

    @property
    def passes(self):
        """In units of one training image, of which evaluating one is about a third."""
        return self.images + self.evaluated / 3


def cost(run, epochs=None):
    """The `Cost` of a run, or of its first epochs."""
    images = 800 if run.protocol == "tune" else 1000
    held_out = 200 if run.protocol == "tune" else tasks.get(run.task).num_test
    epochs = run.epochs if epochs is None else epochs
    if run.protocol in ("official", "tune"):
        times = max(epochs - 1, int(run.epochs == 1 == epochs))
    else:
        times = int(epochs == run.epochs)
    return Cost(epochs * math.ceil(images / run.batch_size), epochs * images, times, times * held_out)


class Forecast:
    """Says what runs cost before they start, and how long they take once an epoch is measured."""

    def __init__(self, works):
        self.left, self.number = {}, {}
        for i, work in enumerate(works, 1):
            searched = work.run.protocol == "vtab" and (work.run.task, work.run.method) not in {
                (w.run.task, w.run.method) for w in works[: i - 1]
            }
            for w in [*(trials(work) if searched else ()), work]:
                if not (w.folder / "result.json").exists():
                    self.left[w.label] = w.run.method, cost(w.run)
                self.number[w.label] = f"[{len(self.number) + 1}/"
        self.told, self.speed = 0.0, {}  # training images a second, by method
        total = functools.reduce(Cost.plus, (c for _, c in self.left.values()), Cost())
        before = len(self.number) - len(self.left)
        print(
            f"{len(self.left)} run(s): {total.steps:,} steps on {total.images:,} training images, "
            f"{total.evaluations:,} evaluation(s) of {total.evaluated:,} images in all"
            + f"; {before} finished before"
            * bool(before),
            flush=True,
        )

    def place(self, work):
        """`"[3/57] cifar rlrr seed 0"`."""
        return f"{self.number[work.label]}{len(self.number)}] {work.label}"

    def tell(self, work, clock, epochs):
        """Prints the time left, after the first epoch of each method and then every ten minutes.

        A method that has not run yet is taken to be as fast as this one.
        """
        method, now = work.run.method, clock.images / clock.seconds
        known, self.speed[method] = method in self.speed, now
        if known and time.monotonic() - self.told < 600:
            return
        self.told = time.monotonic()
        left = {label: c.passes for label, (_, c) in self.left.items()}
        left[work.label] -= cost(work.run, epochs).passes
        seconds = sum(left[k] / self.speed.get(m, now) for k, (m, _) in self.left.items())
        print(f"\nabout {duration(seconds)} left, {method} trains {now:,.0f} images/s", flush=True)

    def finished(self, work):
        """Takes a run off what is left."""
        self.left.pop(work.label, None)


def duration(seconds):
    """`"3 h 12 min"`, `"2 min"`, `"40 s"`."""
    minutes = round(seconds / 60)
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes > 90 else f"{minutes} min"
