"""Runs that train together: which, in which folder, and in smaller groups if memory is short."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlrr_jax import files, job, run_images, train, untrained
from rlrr_jax import run as run_lib
from rlrr_jax.data import sources
from rlrr_jax.results import rows as rows_lib
from rlrr_jax.results.outputs import Outputs
from rlrr_jax.runs import workdir
from rlrr_jax.runs.forecast import Forecast
from rlrr_jax.runs.workdir import Work
from rlrr_jax.runtime import distributed
from rlrr_jax.runtime.memory import TooLarge
from rlrr_jax.runtime.stop import Stop, Stopped


class Loaders(NamedTuple):
    """Where runs get their weights and images from.

    Attributes:
      weights: name -> path and SHA-256.
      load_weights: function `(run, model) -> frozen`.
      load_data: function, see `_load_data`.
      known: outputs of first blocks, see `prefix.applied`.
    """

    weights: dict[str, tuple[str, str]]
    load_weights: Callable
    load_data: Callable
    known: dict


def finish(works: list[Work], load: Loaders, forecast: Forecast, stop: Stop) -> list[dict]:
    """The rows of runs that may be trained together; those that have not been are trained."""
    forecast.expect(works)
    for work in works:
        workdir.check_folder(work, load.weights[work.run.pretrained.name][1])
    for group in waiting(works):
        train_group(group, load, forecast, stop)
    for work in works:
        if work.label in forecast.before and work.folder.parent.name != "search":
            print(f"{forecast.title(work)}: finished before")
        forecast.finished(work)
    read = lambda: [rows_lib.read(work.folder / "result.json") for work in works]
    return distributed.broadcast(read() if distributed.is_process_zero() else None)


def waiting(works: list[Work]) -> list[list[Work]]:
    """The groups to train: as an earlier start made them, those begun alone, then the rest at once."""
    order = distributed.broadcast(_waiting(works) if distributed.is_process_zero() else None)
    return [[works[i] for i in group] for group in order]


def _waiting(works: list[Work]) -> list[list[int]]:
    groups, names = [], {work.folder.name: i for i, work in enumerate(works)}
    for path in files.below(works[0].folder.parent, "together-*", "runs.json"):
        begun = files.read_json(path)["runs"]
        if set(begun) <= names.keys():
            group = [names.pop(name) for name in begun]
            if all(works[i].finished for i in group):
                path.parent.rmtree()
            else:
                groups.append(group)
        elif set(begun) & names.keys():
            print(f"note: {path.parent} was begun with other runs, too: these start again")
    rest = []
    for i in names.values():
        if not works[i].finished:
            alone = (works[i].folder / "checkpoints").exists()
            groups += [[i]] if alone else []
            rest += [] if alone else [i]
    return groups + ([rest] if rest else [])


def train_group(works: list[Work], load: Loaders, forecast: Forecast, stop: Stop) -> None:
    """Trains runs together, in smaller groups if they do not fit into memory.

    What belongs to them all lies in a folder beside theirs until the last has its result: so a killed
    group goes on as the same group, and ends with the same bits.
    """
    if distributed.any_of(stop()):  # asked while the group before ended
        raise Stopped
    folder = _group_folder(works)
    parts = _attempt(works, folder, load, forecast, stop)
    if len(works) > 1 and parts != [works]:  # the same group again goes on from its checkpoint
        _remove(folder)
    for part in parts:
        train_group(part, load, forecast, stop)


def _attempt(
    works: list[Work], folder: Any, load: Loaders, forecast: Forecast, stop: Stop
) -> list[list[Work]]:
    """Trains runs together; the groups to train instead if they do not fit into memory.

    What lies on the devices goes when this returns.
    """
    try:
        runs = [run_lib.of(work.run) for work in works]
        load_weights = functools.partial(load.load_weights, works[0].run)
        built = job.build(runs, load_weights, _data_of(works, load), load.known)
        outputs = _outputs(works, folder, load, forecast)
        if runs[0].recipe.method.untrained is not None:
            untrained.finish(built, outputs)
        else:
            train.train(built, outputs, stop, functools.partial(forecast.on_epoch, works))
        return []
    except TooLarge as e:
        return smaller(works, [work.run for work in works], e, forecast.title(*works))


def _group_folder(works: list[Work]) -> Any:
    """The folder of the checkpoints of runs: of one run its own."""
    if len(works) == 1:
        return works[0].folder
    names = [work.folder.name for work in works]
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
    folder = works[0].folder.parent / f"together-{digest}"
    if distributed.is_process_zero():
        folder.mkdir(exist_ok=True)
        files.write_json(folder / "runs.json", {"runs": names})
    distributed.wait("group")
    return folder


def _source(works: list[Work]) -> sources.Found:
    """Where the images of a group are read: finished runs no longer know it."""
    found = next(work.found for work in works if not work.finished)
    assert found
    return found


def _data_of(works: list[Work], load: Loaders) -> Callable:
    """A function `(split, crop=None) -> images, labels` for the runs of a group."""
    run, found = works[0].run, _source(works)
    pixels, folder = run_images.pixels(run), run.data.cache_dir
    task = run_images.task_of(run)
    return lambda split, crop=None: load.load_data(task, split, pixels, found, folder, crop)


def _outputs(works: list[Work], folder: Any, load: Loaders, forecast: Forecast) -> Outputs:
    run = works[0].run
    return Outputs(
        folders=[work.folder for work in works],
        labels=[work.label for work in works],
        title=forecast.title(*works),
        checkpoints=folder / "checkpoints",
        provenance=workdir.provenance(works[0], load.weights[run.pretrained.name][1]),
        classes=sources.class_names(run_images.task_of(run), _source(works)),
    )


def smaller(works: list, runs: list[ConfigDict], error: TooLarge, title: str) -> list[list]:
    """Groups of as many as fit into memory; the same group with `model.remat` if not even one does.

    Args:
      works: what is divided.
      runs: their configurations, in which `model.remat` is set.
      error: says how many fit.
      title: text before what is printed.
    """
    if fits := error.fits:
        print(f"{title}: {error.why}")
        return [works[i : i + fits] for i in range(0, len(works), fits)]
    print(f"{title}: not enough memory, so activations are computed twice (model.remat)")
    for run in runs:
        run.model.remat = True
    return [works]


def _remove(folder: Any) -> None:
    """Deletes a folder that no process needs any more."""
    distributed.wait("removed")
    if distributed.is_process_zero():
        folder.rmtree()
