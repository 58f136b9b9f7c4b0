"""Many runs: tasks x methods x trials. What trains together, what it costs, what failed."""

import contextlib
import functools
import hashlib
import itertools
import math
import time
import traceback
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath

from rlrr_jax import config as config_lib
from rlrr_jax import distributed, files, pretrained, report, train
from rlrr_jax.data import sources, store, tasks
from rlrr_jax.errors import UserError, first_line


class Work(NamedTuple):
    """A run, its folder, its data, and how it is called on the screen."""

    run: Any
    folder: Any
    found: sources.Found
    label: str


def run(config, workdir=None, stop=None):
    """Trains and evaluates all runs of a configuration.

    In several processes, each calls this; process 0 writes. `stop` is a `train.Stop`.

    Runs that are finished in the workdir are not repeated; an interrupted one goes on; where there
    are several tasks, one that fails does not stop the others.

    Returns:
      The rows of `results.json` of this configuration, and what failed: a run's label -> why.

    Raises:
      UserError: for anything the user can mend, before any work where that can be seen; of a single
        task at once, of several only if none of them can run.
      train.Stopped: if `stop` said so, when all is saved.
    """
    stop = stop or train.Stop()
    runs = config_lib.resolve(config)
    workdir = epath.Path(workdir or f"runs/{config_lib.fingerprint(runs)}").expanduser()
    _check_alike(runs)
    problems = {}
    survive = functools.partial(_survive, problems, alone=len({r.task for r in runs}) == 1)
    works = _locate(runs, workdir, survive)
    if not works:
        raise UserError(f"no task can run; {explain(problems)[0]}")
    places = {(w.run.pretrained.name, w.run.pretrained.cache_dir) for w in works}
    weights = {name: pretrained.fetch(name, cache_dir) for name, cache_dir in places}
    _follow_weights(works, weights)
    _check_weights_alike(works, weights)
    for work in works:
        check_folder(work, weights[work.run.pretrained.name][1])
    load_weights = weights_reader(weights)
    load_weights(works[0].run, config_lib.build_model(works[0].run))  # a misfit is no task's fault
    print(f"workdir: {workdir}", flush=True)
    forecast = Forecast(works)

    load_data = functools.lru_cache(8)(_load_data)  # the runs of a task share its images
    rows = []
    for _, group in itertools.groupby(works, lambda work: config_lib.together(work.run)):
        group = list(group)
        with survive(*group), locked(group):
            load = Loaders(weights, load_weights, load_data)
            train_all = functools.partial(finish, load=load, forecast=forecast, stop=stop)
            rows += train_all(choose(group, train_all))
    if not rows:
        raise UserError(f"every run failed; {explain(problems)[0]}")
    if distributed.lead():
        everything = report.collect(workdir)
        if len(everything) <= report.MOST_CURVES:
            report.all_curves(workdir, everything)
    distributed.wait("reported")
    return rows, problems


def _check_alike(runs):
    """UserError unless every process was given the same configuration."""
    mine = config_lib.fingerprint(runs)
    if distributed.any_of(distributed.agree(mine) != mine):
        raise UserError(
            "the processes were started with different configurations: start the same command "
            "everywhere"
        )


def _check_weights_alike(works, weights):
    """UserError unless every process read the same weights, and the same of what lies beside them."""
    mine = [config_lib.fingerprint([work.run for work in works])]
    mine += [weights[work.run.pretrained.name][1] for work in works]
    if distributed.any_of(distributed.agree(mine) != mine):
        raise UserError(
            "the processes found different weights, or different config.json files beside them: copy "
            "the same files to every host"
        )


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
        folder = workdir / r.task / report.method_folder(r) / report.folder(r)
        folder.mkdir(parents=True, exist_ok=True)
        label = f"{r.task} {report.method_folder(r)} seed {r.seed}" + f" {r.trial}" * bool(r.trial)
        work = Work(r, folder, None, label)
        with survive(work):
            if found := _before(r, folder):  # its data may be gone
                works.append(work._replace(found=found))
                continue
            found = config_lib.locate(r)
            where = (config_lib.pixels(r), found, r.data.cache_dir)
            if found.kind != "bundled":
                pairs = [train.splits(r)]
                pairs += [tasks.get(r.task).parts[:2]] if r.protocol == "vtab" else []
                stored = {part for pair in pairs for part in (pair[1:] if r.crop else pair)}
                entries += [entry(r.task, part, *where) for part in sorted(stored)]
            works.append(work._replace(found=found))
    if wanted := store.missing_bytes(entries):
        print(f"decoded images to write: {wanted / 1e9:.2f} GB{_there(runs[0])}", flush=True)
        store.check_space(wanted, runs[0].data.cache_dir)
    return works


def _there(run):
    """What lies in the cache of images already, in words; empty if nothing does."""
    there = store.entries(run.data.cache_dir)
    if not there:
        return ""
    unused = [size for _, size, why in there if why]
    text = f"; {store.images_folder(run.data.cache_dir)} holds {sum(e[1] for e in there) / 1e9:.2f} GB"
    if unused:
        text += f", {sum(unused) / 1e9:.2f} GB of no use any more (python -m rlrr_jax.prepare --prune)"
    return text


def _before(run, folder):
    """Where the data of a finished run came from, which is filled in; None if it is not finished."""
    if not (folder / "result.json").exists() or not (folder / "config.json").exists():
        return None
    saved = files.read_json(folder / "config.json")
    for key in ("source", "variant"):
        if run.data[key] is None or run.data[key] == saved["data"][key]:
            run.data[key] = saved["data"][key]
    return sources.Found(saved["data"]["source"], None, saved["dataset"])


def _follow_weights(works, weights):
    """Fills in the runs' GELU and pixels, and says where a configuration differs from its weights."""
    notes = []
    for work in works:
        path = pretrained.split_subtree(weights[work.run.pretrained.name][0])[0]
        notes += config_lib.follow(work.run, path)
    for note in dict.fromkeys(notes):
        print(note, flush=True)


class Loaders(NamedTuple):
    """Where runs get their weights and images from.

    Attributes:
      weights: name -> path and SHA-256.
      load_weights: `(run, model) -> frozen`.
      load_data: see `_load_data`.
    """

    weights: dict
    load_weights: Any
    load_data: Any


def weights_reader(weights):
    """A function `(run, model) -> frozen` that reads each file once, though heads differ by task.

    Args:
      weights: name -> path and SHA-256.
    """
    last = {}  # of one file, which most suites have

    def read(run, model):
        path, _ = weights[run.pretrained.name]
        headless = model.clone(num_classes=1, gelu="exact")
        key = path, run.image_size, run.pretrained.to_json(), headless
        if key not in last:
            last.clear()
            last[key] = config_lib.load_weights(run, path, headless, note=_print)
        width = model.width
        head = {"kernel": np.zeros((width, model.num_classes), np.float32)}
        return {**last[key], "head": {**head, "bias": np.zeros(model.num_classes, np.float32)}}

    return read


def _print(text):
    print(text, flush=True)


@contextlib.contextmanager
def _survive(problems, *works, alone):
    """Notes what goes wrong with runs, in `error.txt` too, and goes on; raises it if `alone`."""
    try:
        yield
        for work in works:
            (work.folder / "error.txt").unlink(missing_ok=True)
    except Exception as e:
        if alone or distributed.several():  # the others would wait for this process
            raise
        expected = isinstance(e, UserError | OSError)
        text = str(e) if expected else f"{type(e).__name__}: {first_line(e)}"
        for work in works:
            path = work.folder / "error.txt"
            files.write(path, text if expected else traceback.format_exc())
            why = text if expected else f"{text} ({works[0].folder / 'error.txt'})"
            if why not in problems.values():  # once for all seeds
                print(f"{work.label}: failed: {why}", flush=True)
            problems[work.label] = why


@contextlib.contextmanager
def locked(works):
    """Holds the folders of runs for this process."""
    with contextlib.ExitStack() as stack:
        for work in works if distributed.lead() else ():
            work.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.lock(work.folder))
        distributed.wait("locked")
        yield


# What trains together -------------------------------------------------------------------------


def finish(works, load, forecast, stop):
    """The rows of runs that may be trained together; those that have not been are trained."""
    for work in works:
        check_folder(work, load.weights[work.run.pretrained.name][1])
    for group in waiting(works):
        train_group(group, load, forecast, stop)
    for work in works:
        if work.label in forecast.before and work.folder.parent.name != "search":
            print(f"{forecast.place(work)}: finished before", flush=True)
        forecast.finished(work)
    read = lambda: [report.read_row(work.folder / "result.json") for work in works]
    return distributed.agree(read() if distributed.lead() else None)


def finished(work):
    """Whether a run has its result."""
    return (work.folder / "result.json").exists()


def waiting(works):
    """The groups to train: as an earlier start made them, those begun alone, then the rest at once."""
    order = distributed.agree(_waiting(works) if distributed.lead() else None)
    return [[works[i] for i in group] for group in order]


def _waiting(works):
    groups, names = [], {work.folder.name: i for i, work in enumerate(works)}
    for path in sorted(works[0].folder.parent.glob("together-*/runs.json")):
        begun = files.read_json(path)["runs"]
        if set(begun) <= names.keys():
            group = [names.pop(name) for name in begun]
            if all(finished(works[i]) for i in group):
                path.parent.rmtree()
            else:
                groups.append(group)
    rest = []
    for i in names.values():
        if not finished(works[i]):
            alone = (works[i].folder / "checkpoints").exists()
            groups += [[i]] if alone else []
            rest += [] if alone else [i]
    return groups + ([rest] if rest else [])


def _remove(folder):
    """Deletes a folder that no process needs any more."""
    distributed.wait("removed")
    if distributed.lead():
        folder.rmtree()


def train_group(works, load, forecast, stop):
    """Trains runs together, in smaller groups if they do not fit into memory.

    What belongs to them all lies in a folder beside theirs until the last has its result: so a killed
    group goes on as the same group, and ends with the same bits.
    """
    if distributed.any_of(stop()):  # asked while the group before ended
        raise train.Stopped
    run, folder = works[0].run, works[0].folder
    found = next(work.found for work in works if not finished(work))
    if len(works) > 1:
        names = [work.folder.name for work in works]
        digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
        folder = works[0].folder.parent / f"together-{digest}"
        if distributed.lead():
            folder.mkdir(exist_ok=True)
            files.write_json(folder / "runs.json", {"runs": names})
        distributed.wait("group")
    sha256 = load.weights[run.pretrained.name][1]
    try:
        train.train_together(
            runs=[work.run for work in works],
            folders=[work.folder for work in works],
            labels=[work.label for work in works],
            title=forecast.place(*works),
            checkpoints=folder / "checkpoints",
            load_weights=load.load_weights,
            marks=_marks(works[0], sha256),
            classes=sources.class_names(run.task, found),
            load_data=lambda split, crop=None: load.load_data(
                run.task, split, config_lib.pixels(run), found, run.data.cache_dir, crop
            ),
            tell=functools.partial(forecast.tell, works),
            stop=stop,
        )
        parts = []
    except train.TooLarge as e:
        parts = _smaller(works, e.fits, forecast.place(*works))
    if len(works) > 1 and parts != [works]:  # the same group again goes on from its checkpoint
        _remove(folder)
    for part in parts:
        train_group(part, load, forecast, stop)


def _smaller(works, fits, title):
    """Groups of as many as fit into memory; the same group with `model.remat` if not even one does."""
    if fits:
        print(f"{title}: {fits} fit into memory at once", flush=True)
        return [works[i : i + fits] for i in range(0, len(works), fits)]
    print(f"{title}: not enough memory, so activations are computed twice (model.remat)", flush=True)
    for work in works:
        work.run.model.remat = True
    return [works]


def choose(works, train_all):
    """Runs of the protocol "vtab" with their hyper-parameters, the best of the grid on val200.

    Ties go to the smaller learning rate, then weight decay, then drop path. Others are returned as
    they are.
    """
    if works[0].run.protocol != "vtab":
        return works
    search = trials(next((work for work in works if not finished(work)), works[0]))
    with locked(search):
        rows = train_all(search)
    rows = [row for row in rows if row["train_loss"] is not None]  # those that did not diverge
    if not rows:
        raise UserError(
            f"the loss of {works[0].run.task} {works[0].run.method} is finite at no setting of "
            f"config.grid: put smaller learning rates into it and choose another --workdir"
        )
    best = min(rows, key=lambda row: (-row["val_acc"], *(row[key] for key in config_lib.GRID)))
    out = []
    for work in works:
        run = ml_collections.ConfigDict(work.run.to_dict())
        run.update({key: best[key] for key in config_lib.GRID})
        run.val_acc = best["val_acc"]
        out.append(work._replace(run=run))
    return out


def trials(work):
    """The runs on 800 and 200 images that a run of the protocol "vtab" chooses from; all of seed 0."""
    out = []
    for run in config_lib.trials(work.run):
        folder = work.folder.parent / "search" / report.folder(run)
        label = f"{run.task} {report.method_folder(run)} {report.folder(run)}"
        out.append(Work(run, folder, work.found, label))
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
            f"delete that folder" + _as_before(old, new)
        )


def _as_before(old, new):
    """How a run of an older version goes on, which resized every position embedding linearly."""
    resize = [values["pretrained"].get("resize") for values in (old, new)]
    if resize[0] is None and resize[1] is not None:
        return ", or go on as it was begun by --config.pretrained.resize=linear"
    return ""


def _marks(work, sha256):
    return {"backbone_sha256": sha256, "dataset": work.found.dataset}


def _load_data(task, split, pixels, found, cache_dir, crop):
    """Images and labels, or where `crop` says so the crops of a seed, of a split."""
    if crop:
        return store.load_crops(task, split, pixels, crop, found)
    return store.load_split(task, split, pixels, found, cache_dir)


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
    images, held_out = map(tasks.get(run.task).number, train.splits(run))
    epochs = run.epochs if epochs is None else epochs
    if run.protocol in ("official", "tune"):
        times = max(epochs - 1, int(run.epochs == 1 == epochs))
    else:
        times = int(epochs == run.epochs)
    steps = epochs * math.ceil(images / run.batch_size)
    if run.total_steps and steps > run.total_steps:
        steps, images = run.total_steps, images * run.total_steps / steps
    return Cost(steps, round(epochs * images), times, times * held_out)


class Forecast:
    """Says what runs cost before they start, and how long they take once an epoch is measured."""

    def __init__(self, works):
        self.left, self.number, self.before = {}, {}, set()
        for i, work in enumerate(works, 1):
            searched = work.run.protocol == "vtab" and work.folder.parent not in {
                w.folder.parent for w in works[: i - 1]
            }
            for w in [*(trials(work) if searched else ()), work]:
                if finished(w):
                    self.before.add(w.label)
                else:
                    self.left[w.label] = w.run.method, cost(w.run)
                self.number[w.label] = len(self.number) + 1
        self.told, self.speed = 0.0, {}  # training images a second, by method
        total = functools.reduce(Cost.plus, (c for _, c in self.left.values()), Cost())
        before = len(self.before)
        print(
            f"{len(self.left)} run(s): {total.steps:,} steps on {total.images:,} training images, "
            f"{total.evaluations:,} evaluation(s) of {total.evaluated:,} images in all"
            + f"; {before} finished before"
            * bool(before),
            flush=True,
        )

    def place(self, *works):
        """`"[3/57] cifar rlrr seed 0"`, `"[4-6/57] dtd rlrr, 3 trials"`."""
        first, last = (self.number[work.label] for work in (works[0], works[-1]))
        many = f"{works[0].run.task} {report.method_folder(works[0].run)}, {len(works)} trials"
        text, span = (works[0].label, first) if len(works) == 1 else (many, f"{first}-{last}")
        return f"[{span}/{len(self.number)}] {text}"

    def tell(self, works, clock, epochs):
        """Prints the time left, after the first epoch of each method and then every ten minutes.

        A method that has not run yet is taken to be as fast as this one.
        """
        method, now = works[0].run.method, clock.images / clock.seconds
        known, self.speed[method] = method in self.speed, now
        if known and time.monotonic() - self.told < 600:
            return
        self.told = time.monotonic()
        left = {label: c.passes for label, (_, c) in self.left.items()}
        for work in works:
            if work.label in left:  # else it finished before, and is trained again with its group
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
