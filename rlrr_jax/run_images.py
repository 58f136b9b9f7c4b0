"""The images of a run: its task, where they come from, what is made of them, which are tested."""

import functools

from ml_collections import ConfigDict

from rlrr_jax import checks, methods
from rlrr_jax.data import decoding, folds, own, sources, tasks
from rlrr_jax.data.task import Task
from rlrr_jax.errors import UserError
from rlrr_jax.sides import Size


@functools.lru_cache(64)
def pixels_of(task: Task, found: sources.Found) -> tuple:
    """`sources.pixels` of a task's source, looked at once."""
    return sources.pixels(task, found)


def locate(run: ConfigDict) -> sources.Found:
    """Fills in where a run's data comes from and what its pixels are; returns where it is.

    Raises UserError if the data is not there, or its pixels are not those asked for.
    """
    found = sources.find(task_of(run), run.data.dir, run.data.source)
    kind, *_ = pixels_of(task_of(run), found)
    if found.kind == "folder" and run.data.variant not in (None, kind):
        raise UserError(
            f"the images in {found.path} are not {run.data.variant} but {kind}: leave out "
            f"config.data.variant, or take them from tfds"
        )
    run.data.source = found.kind
    checks.fill(run.data, "variant", kind)
    return found


def task_of(run: ConfigDict) -> Task:
    """The task of a run: one of ours by its name, or the user's own images.

    Raises UserError for images that cannot be used.
    """
    given = run.own
    if given.path is None:
        return tasks.get(run.task)
    options = own.Options(given.val, given.test, given.shots, given.seed)
    return _own_task(run.task, given.path, options, run.data.dir)


_own_task = functools.lru_cache(8)(own.task)  # which looks at every image


def forget_images() -> None:
    """Forgets what was seen of images of one's own: a folder may have changed since."""
    _own_task.cache_clear()
    pixels_of.cache_clear()


def splits(run: ConfigDict) -> tuple[str, str]:
    """Which split a run trains on, and which it is evaluated on after its epochs."""
    train, val, both = task_of(run).parts
    if run.get("fold"):  # of a search, see `runs.search`
        return folds.names(*run.fold)
    return (train, val) if run.protocol == "tune" or fits(run) or run.get("keep") else (both, "test")


def tested(run: ConfigDict) -> str | None:
    """The split that a run is evaluated on at its end beside that of `splits`; None for none."""
    return "test" if run.protocol != "tune" and splits(run)[1] != "test" else None


def fits(run: ConfigDict) -> tuple[str, ...]:
    """What is chosen at a run's end on images set aside, in words.

    "temperature", "thresholds" of labels, and the options of a method that trains nothing.
    """
    if methods.get(run.method).untrained is not None:
        return (f"options of {run.method}",)
    of_labels = task_of(run).kind == "labels"
    return ("temperature",) * bool(run.get("temperature")) + ("thresholds",) * of_labels


def evaluates(run: ConfigDict, epoch: int) -> bool:
    """Whether a run is evaluated after an epoch, counted from 0: always after the last."""
    if epoch + 1 == run.epochs:
        return True
    if run.get("keep"):
        return (epoch + 1) % run.eval_every == 0
    if run.protocol in ("fast", "vtab") or epoch == 0:  # the authors skip the first, too
        return False
    if "searching" in run and run.searching:
        return False
    return (epoch + 1) % run.eval_every == 0


def pixels(run: ConfigDict) -> decoding.Pixels:
    """What is made of a run's images."""
    options = dict(variant=run.data.variant, upright=run.data.upright)
    options["white"] = run.own.path is not None
    return decoding.pixels_for(size_of(run), run.crop, run.crop_from, **options)


def size_of(run: ConfigDict) -> Size:
    """Size of the images that a run's model takes, see `sides`."""
    width = run.image_width
    return run.image_size if width in (None, run.image_size) else (run.image_size, width)
