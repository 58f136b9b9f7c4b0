"""All tasks by name: VTAB-1k's, two bundled ones, four whole datasets, and those of projects."""

from collections.abc import Iterable

from rlrr_jax import lookup
from rlrr_jax.data.task import Task, splits
from rlrr_jax.data.vtab import GROUPS, VTAB
from rlrr_jax.errors import UserError, unknown


# Chosen on val200, mean of three seeds (--config.protocol=tune --config.seeds="(0,1,2)").
def _tuned(lr, weight_decay=1e-4, **kwargs):
    return dict(lr=lr, weight_decay=weight_decay, drop_path=0.0, **kwargs)


_PARTS = splits("train800", "val200", "test")
BUNDLED = {
    "hearts": Task(
        name="hearts",
        group="bundled",
        splits=_PARTS,
        schedule="cosine",
        classes=16,
        names=tuple(f"{22.5 * i:g}°" for i in range(16)),
        num_test=2000,
        side=32,
        epochs=12,
        recipes={
            "linear": _tuned(0.02, 0.03, epochs=36),  # cheap epochs, to convergence
            "rlrr": _tuned(0.02),
            "full": _tuned(1e-3),
        },
    ),
    "digits": Task(
        name="digits",
        group="bundled",
        splits=_PARTS,
        schedule="cosine",
        classes=10,
        names=tuple("0123456789"),
        num_test=797,
        side=32,
        epochs=8,
        recipes={"linear": _tuned(0.03), "rlrr": _tuned(0.02), "full": _tuned(5e-4)},
    ),
}


def _full(task_name, dataset, number, percent, classes, num_test, **kwargs):
    """A whole dataset as big_vision's configs/transfer.py splits it."""
    name, version = dataset.split(":")
    train = round(number * percent / 100)
    return Task(
        name=task_name,
        group="full",
        splits={"train": f"train[:{train}]", "val": f"train[{train}:]", "test": "test"},
        classes=classes,
        num_test=num_test,
        tfds=name,
        version=version,
        majors=(int(version[0]), *kwargs.pop("majors", ())),
        flip=True,
        sizes={"train": train, "val": number - train},
        parts=("train", "val", "train"),
        **kwargs,
    )


FULL = {
    "cifar10_full": _full("cifar10_full", "cifar10:3.0.2", 50000, 98, 10, 10000, side=32),
    "cifar100_full": _full("cifar100_full", "cifar100:3.0.2", 50000, 98, 100, 10000, side=32),
    "pets_full": _full("pets_full", "oxford_iiit_pet:4.0.0", 3680, 90, 37, 3669, majors=(3,)),
    "flowers_full": _full("flowers_full", "oxford_flowers102:2.1.1", 1020, 90, 102, 6149),
}
TASKS = {**VTAB, **BUNDLED, **FULL}
# Other names in use: tfds's, VTAB's and those of papers' code.
ALIASES = {
    "cifar100": "cifar",
    "caltech": "caltech101",
    "flowers": "oxford_flowers102",
    "flowers102": "oxford_flowers102",
    "pet": "oxford_iiit_pet",
    "pets": "oxford_iiit_pet",
    "oxford_pet": "oxford_iiit_pet",
    "svhn_cropped": "svhn",
    "camelyon": "patch_camelyon",
    "pcam": "patch_camelyon",
    "resisc": "resisc45",
    "retinopathy": "diabetic_retinopathy",
    "diabetic_retinopathy_detection": "diabetic_retinopathy",
    "clevr_distance": "clevr_dist",
    "kitti_distance": "kitti",
    "dsprites_location": "dsprites_loc",
    "dsprites_orientation": "dsprites_ori",
    "smallnorb_azimuth": "smallnorb_azi",
    "smallnorb_elevation": "smallnorb_ele",
}


def get(task: str | Task) -> Task:
    """The task of a name, or a task itself; UserError with the nearest name if there is none."""
    if isinstance(task, Task):
        return task
    if (name := canonical(task)) in TASKS:
        return TASKS[name]
    found = lookup.find("task", name)
    if not isinstance(found, Task):
        raise UserError(f"{task} is no task: make it a rlrr_jax.data.task.Task")
    return found


def canonical(name: str) -> str:
    """Our name of a task; UserError with the nearest name if there is none."""
    if lookup.is_path(name) or name in TASKS or name in ALIASES:
        return ALIASES.get(name, name)
    if name in (theirs := lookup.names("task")):
        return lookup.find("task", name).name
    groups = [*GROUPS, "all", "full", *lookup.names("tasks")]
    raise unknown("task", name, [*TASKS, *ALIASES, *theirs, *groups])


def expand(names: Iterable[str]) -> list[str]:
    """Names of tasks for names, aliases, groups and "all", each once."""
    groups = {**GROUPS, "all": tuple(VTAB), "bundled": tuple(BUNDLED), "full": tuple(FULL)}
    theirs = lookup.names("tasks")
    of = lambda name: lookup.find("tasks", name) if name in theirs else (canonical(name),)
    every = [task for name in names for task in groups.get(name) or of(name)]
    return list(dict.fromkeys(every))


def sharing(task: Task, split: str) -> list[Task]:
    """The tasks that have the same images in a split, in the same order."""
    like = lambda t: (t.group, t.tfds or t.name, t.image, t.scale, t.splits.get(split))
    return [t for t in TASKS.values() if t.tfds and like(t) == like(task)] or [task]
