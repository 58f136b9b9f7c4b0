"""Many runs: tasks x methods x settings x seeds. What is checked first, what failed, what goes on."""

import contextlib
import errno
import functools
import glob
import itertools
import os
import re
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from rlrr_jax import config as config_lib
from rlrr_jax import files, heads, report, run_images, run_model
from rlrr_jax.data import cache, crops, store
from rlrr_jax.data.examples import SHOWN, Unusable
from rlrr_jax.data.task import Task
from rlrr_jax.errors import UserError, first_line
from rlrr_jax.results import logs
from rlrr_jax.results import rows as rows_lib
from rlrr_jax.runs import group, identity, loaders, parts, search, workdir
from rlrr_jax.runs.forecast import Forecast
from rlrr_jax.runs.parts import Part
from rlrr_jax.runs.workdir import Work
from rlrr_jax.runtime import distributed, memory
from rlrr_jax.runtime.stop import Stop
from rlrr_jax.weights import names


def run(
    config: Any, folder: Any = None, stop: Stop | None = None, part: Part | None = None
) -> tuple[list[dict], dict[str, str]]:
    """Trains and evaluates all runs of a configuration.

    Runs that are finished in the workdir are not repeated; an interrupted one goes on; where there
    are several tasks, one that fails does not stop the others. In several processes, each calls this,
    and process 0 writes; main silences the others.

    Args:
      config: the configuration.
      folder: the workdir; None is `runs/<digest of the runs>`.
      stop: whether to stop.
      part: which share of the runs this process trains, see `parts`; None is all.

    Returns:
      The rows of `results.json` of this configuration, of a part those of all that is finished, and
      what failed: a run's label -> why.

    Raises:
      UserError: for anything the user can fix, before any work where that can be seen; of a single
        task at once, of several only if none of them can run.
      Stopped: if `stop` said so, when all is saved.
    """
    if hasattr(sys.stdout, "reconfigure"):  # of a script that calls this, too: lines come when printed
        sys.stdout.reconfigure(line_buffering=True)
    stop = stop or Stop()
    run_images.forget_images()  # a notebook's folder may have changed
    _describe.cache_clear()
    try:
        runs = config_lib.resolve(config)
    except Unusable as e:
        raise _listed(e, epath.Path(folder or "runs").expanduser()) from e
    folder = _workdir(folder or f"runs/{identity.fingerprint(runs)}")
    logs.check(runs[0].log)
    codes = [run.get("code") for run in runs]
    plain = [ConfigDict({k: v for k, v in run.to_dict().items() if k != "code"}) for run in runs]
    _check_alike(identity.fingerprint(plain), _OTHER_CONFIGURATIONS)
    _check_alike([identity.code(), codes], _OTHER_CODE)
    _check_shared(folder)
    problems: dict[str, str] = {}
    alone = part is None and len({r.task for r in runs}) == 1
    survive = functools.partial(_survive, problems, alone=alone, pass_over=part is not None)
    heads.share(runs)
    if part:
        workdir.write_list(folder, [rows_lib.folder(folder, run) for run in runs])
    works = locate(parts.share(runs, part) if part else runs, folder, survive)
    _check_alike([work.found and work.found.dataset for work in works], _OTHER_IMAGES)
    if not works and problems and not part:
        raise UserError(f"no task can run; {explain(problems)[0]}")
    print(f"workdir: {folder}")
    if part:
        print(f"{part}: {len(works)} of {len(runs)} runs")
    rows = _finish(works, survive, stop, part) if works else []
    if not rows and problems and not part:
        raise UserError(f"every run failed; {explain(problems)[0]}")
    if part:
        rows = _finished(runs, folder)
        print(f"{part}: {len(rows)} of {len(runs)} runs are finished")
    if rows and distributed.is_process_zero():
        _report(folder, part)
    distributed.wait("reported")
    return rows, problems


def _finish(works: list[Work], survive: Callable, stop: Stop, part: Part | None) -> list[dict]:
    """Trains what is not finished; the rows of all. A part passes over what another process holds."""
    workdir.keep_heads(works)
    load = open_weights(works)
    if not all(work.finished for work in works):
        _say_devices(works[0].run.num_devices)
    left = [work.run for work in works if not work.finished]
    for line in dict.fromkeys(
        text(run) for text in (_augmentation, _set_aside, _folds) for run in left
    ):
        if line:
            print(line)
    forecast = Forecast(works, str(part or ""))
    train_all = functools.partial(group.finish, load=load, forecast=forecast, stop=stop)
    rows, later = [], []

    def train(alike: list[Work]) -> None:
        with survive(*alike), workdir.locked(alike):
            settings = itertools.groupby(alike, lambda work: work.run.trial)  # each chooses for itself
            rows.extend(train_all([w for _, s in settings for w in search.choose(list(s), train_all)]))

    for _, several in itertools.groupby(works, lambda work: identity.together(work.run)):
        alike = list(several)
        try:
            train(alike)
        except files.Held:
            if part is None:
                raise
            later.append(alike)
    for alike in later:
        try:
            train(alike)
        except files.Held:
            print(f"{part}: {alike[0].label}: left to the process that is training it")
    return rows


def _finished(runs: list, folder: Any) -> list[dict]:
    """The rows of all runs that are finished, by whichever part."""
    paths = [rows_lib.folder(folder, run) / "result.json" for run in runs]
    return [rows_lib.read(path) for path in paths if path.exists()]


def _report(folder: Any, part: Part | None) -> None:
    """Writes the tables; again if another part has finished a run meanwhile."""
    try:
        found = report.collect(folder)
        while part and len(rows_lib.find([folder])) > len(found):
            found = report.collect(folder)
    except OSError as e:
        if e.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        print(f"note: {folder} cannot be written ({e.strerror}), and keeps the tables that it has")


def explain(problems: dict[str, str]) -> list[str]:
    """A line for each reason why runs failed: `"kitti rlrr seed 0, kitti rlrr seed 1: why"`."""
    labels: dict[str, list[str]] = {}
    for label, why in problems.items():
        labels.setdefault(why, []).append(label)
    return [f"{', '.join(of)}: {why}" for why, of in labels.items()]


# Before any work ------------------------------------------------------------------------------

_OTHER_CONFIGURATIONS = (
    "the processes were started with different configurations: start the same command everywhere"
)
_OTHER_WEIGHTS = (
    "the processes found different weights, or different config.json files beside them: copy the same "
    "files to every host"
)


_OTHER_IMAGES = (
    "the processes found different images: copy the same files to every host, or share their folder"
)
_OTHER_CODE = (
    "the processes run different code: bring rlrr_jax, jax and the files that paths name to the same "
    "version on every host"
)


def _workdir(folder: Any) -> Any:
    """The path of a workdir; UserError for an address that cannot be reached."""
    scheme = str(folder).partition("://")[0] if "://" in str(folder) else ""
    if scheme not in ("", "gs", "s3"):
        raise UserError(f"--workdir={folder} is no folder: write a path, or gs://BUCKET/FOLDER")
    try:
        path = epath.Path(folder).expanduser()
        path.exists()
        return path
    except ImportError as e:
        package = {"gs": "gcsfs", "s3": "s3fs"}[scheme]
        raise UserError(f"{folder} cannot be reached ({first_line(e)}): pip install {package}") from e


def _check_shared(folder: Any) -> None:
    """UserError unless every process sees the workdir of process 0: a word is written by one."""
    if not distributed.several():
        return
    token = distributed.broadcast(secrets.token_hex(8))
    path = folder / f".shared-{token}"
    if distributed.is_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        files.write(path, token)
    distributed.wait("token written")
    seen = path.exists()
    distributed.wait("token read")
    if distributed.is_process_zero():
        path.unlink(missing_ok=True)
    if distributed.any_of(not seen):
        raise UserError(
            f"not every process sees the workdir {folder} of process 0: name a folder that all share, "
            f"by --workdir"
        )


def _check_alike(mine: Any, text: str) -> None:
    """UserError unless every process has the same value."""
    if distributed.any_of(distributed.broadcast(mine) != mine):
        raise UserError(text)


def locate(runs: list, folder: Any, survive: Callable) -> list[Work]:
    """The runs whose data is there, as `Work`; checks the space their images need."""
    works, entries = [], []
    entry = functools.cache(store.locate)  # the runs of a task share it
    for r in runs:
        own = rows_lib.folder(folder, r)
        own.mkdir(parents=True, exist_ok=True)
        label = f"{r.task} {workdir.method_folder(r)} seed {r.seed}" + f" {r.trial}" * bool(r.trial)
        work = Work(r, own, None, label)
        with survive(work):
            found = None if r.own.path else workdir.finished_source(r, own)
            if found:  # its data may be gone
                works.append(work._replace(found=found))
                continue
            found = run_images.locate(r)
            if found.kind == "folder":
                _, alike, looked = run_images.pixels_of(run_images.task_of(r), found)
                _say(
                    f"{r.task}: {alike} of {looked} test images are JPEG of quality 75, as those of "
                    f"the published folders are, and some original ones"
                )
            _describe(run_images.task_of(r), folder)
            where = (run_images.pixels(r), found, r.data.cache_dir)
            if found.kind != "bundled":
                pairs = [run_images.splits(r), *([("test",) * 2] if run_images.tested(r) else [])]
                if r.protocol == "vtab":
                    pairs += [] if r.grid.folds else [run_images.task_of(r).parts[:2]]
                stored = {
                    part for pair in pairs for part in (pair[1:] if crops.by_host(r.crop) else pair)
                }
                entries += [entry(run_images.task_of(r), part, *where) for part in sorted(stored)]
            works.append(work._replace(found=found))
    if wanted := store.missing_bytes(entries):
        there = cache.described(runs[0].data.cache_dir)
        print(f"decoded images to write: {wanted / 1e9:.2f} GB{there}")
        cache.check_space(wanted, runs[0].data.cache_dir)
    return works


def _listed(error: Unusable, folder: Any) -> UserError:
    """The error, with all that cannot be used in a file if they are many."""
    if len(error.bad) <= SHOWN or not distributed.is_process_zero():
        return error
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "bad.txt", "".join(f"{path}\t{why}\n" for path, why in error.bad))
    return UserError(f"{error}; {folder / 'bad.txt'} names all {len(error.bad)}")


def _say_devices(number: int | None) -> None:
    """Prints on what is trained, and warns of a GPU or TPU that is there and unused."""
    devices = jax.devices()
    print(f"training on {memory.words(memory.machine(number or len(devices)))}")
    there = {"cuda13": glob.glob("/dev/nvidia[0-9]*"), "tpu": glob.glob("/dev/accel[0-9]*")}
    for extra, found in there.items():
        if found and devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
            print(
                f"warning: {found[0]} is there and not used, since this JAX knows only the CPU: pip "
                f"install 'jax[{extra}]'",
                file=sys.stderr,
            )


def _set_aside(run: Any) -> str:
    """What images are not trained on so that something is chosen on them, in words; "" for none."""
    split, number = run_images.splits(run)[1], run_images.task_of(run).number
    if run_images.tested(run) is None:
        return ""
    of = ["the best epoch"] * bool(run.keep) + [f"the {key}" for key in run_images.fits(run)]
    return f"{run.task}: {number(split)} images are set aside, and choose {' and '.join(of)}"


def _folds(run: Any) -> str:
    """What a search averages, in words; "" for nothing."""
    folds = run.grid.folds if run.protocol == "vtab" else 0
    if not folds:
        return ""
    split, number = run_images.splits(run)[0], run_images.task_of(run).number
    return (
        f"{run.task}: settings are chosen by their means over {folds} folds of {number(split):,} images"
    )


def _augmentation(run: Any) -> str:
    """How training images are changed, in words."""
    name = f"{run.task}: training images are "
    parts = ["flipped left to right at random" if run.flip else "not flipped"]
    parts += [f"cropped ({run.crop})"] if run.crop else []
    parts += [f"mixed ({key}={run[key]:g})" for key in ("mixup", "cutmix") if run[key]]
    text = name + ", ".join(parts)
    if not (run.flip and run.own.path is not None):
        return text
    words = {w for n in run_images.task_of(run).names for w in re.split(r"[^a-z]+", n.lower())}
    sides = {"left", "right"} <= words
    text += ": --config.flip=False where left and right, text or digits are what matters"
    return f"warning: {text} (there are classes of left and right)" if sides else text


@functools.cache
def _describe(task: Task, folder: Any) -> None:
    """Prints what there is to know of a task's images, and writes their splits beside the runs."""
    for note in task.notes:
        print(f"{task.name}: {note}")
    path = folder / workdir.task_folder({"task": task.name}) / "split.csv"
    if task.listing and distributed.is_process_zero():
        if not path.exists() or path.read_text() != task.listing:
            files.write(path, task.listing)


def open_weights(works: list[Work]) -> group.Loaders:
    """Fetches all weights, fills in what they say of themselves, and checks that they fit."""
    places = {(w.run.pretrained.name, w.run.pretrained.cache_dir) for w in works}
    weights = {name: names.fetch(name, cache_dir) for name, cache_dir in places}
    notes = []
    for work in works:
        path = names.split_subtree(weights[work.run.pretrained.name][0])[0]
        notes += run_model.follow(work.run, path)
    for note in dict.fromkeys(notes):
        print(note)
    for work in works:
        run_model.check_contracts(work.run)  # on the model that the weights made it
    mine = [identity.fingerprint([work.run for work in works])]
    mine += [weights[work.run.pretrained.name][1] for work in works]
    _check_alike(mine, _OTHER_WEIGHTS)
    for work in works:
        workdir.check_folder(work, weights[work.run.pretrained.name][1])
    load_weights = loaders.weights_reader(weights, print)
    load_weights(works[0].run, run_model.build_model(works[0].run))  # a misfit is no task's fault
    folds_of = max(work.run.grid.folds if "grid" in work.run else 0 for work in works)
    return group.Loaders(weights, load_weights, loaders.images_reader(8 + 2 * folds_of), {})


@functools.cache
def _say(text: str) -> None:
    """Prints a line once."""
    print(text)


@contextlib.contextmanager
def _survive(problems: dict[str, str], *works: Work, alone: bool, pass_over: bool) -> Iterator[None]:
    """Notes what goes wrong with runs, in `error.txt` too, and goes on; raises it if `alone`.

    With `pass_over` it raises `files.Held`, too: another process trains these.
    """
    try:
        yield
        for work in works:
            if (path := work.folder / "error.txt").exists():
                path.unlink()
    except Exception as e:
        if pass_over and isinstance(e, files.Held):
            raise
        if isinstance(e, Unusable):
            e = _listed(e, works[0].folder.parents[1])
        if alone or distributed.several():  # the others would wait for this process
            raise e
        expected = isinstance(e, UserError | OSError)
        text = str(e) if expected else f"{type(e).__name__}: {first_line(e)}"
        for work in works:
            path = work.folder / "error.txt"
            files.write(path, text if expected else traceback.format_exc())
            why = text if expected else f"{text} ({works[0].folder / 'error.txt'})"
            if why not in problems.values():  # once for all seeds
                print(f"{work.label}: failed: {why}")
            problems[work.label] = why
