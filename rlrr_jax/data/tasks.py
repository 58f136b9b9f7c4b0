"""What each task is. Sources: VTAB (Zhai et al., 2019) for the splits, the authors' VTABConfig.py for
the recipes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from rlrr_jax.errors import unknown


class Task(NamedTuple):
    """One classification task.

    Attributes:
      source: "bundled" or "tfds".
      splits: our split names -> what the source calls them.
      classes: number of classes.
      num_test: number of test images.
      tfds: tfds name and version.
      image_key, label_key: of a tfds example.
      flip: whether the recipe flips training images.
      epochs: the recipe's.
      schedule: see `optim.learning_rates`.
      recipes: by method, what replaces the method's DEFAULTS (and the task's epochs).
    """

    source: str
    splits: dict
    classes: int
    num_test: int
    tfds: str = ""
    image_key: str = "image"
    label_key: str = "label"
    flip: bool = False
    epochs: int = 110
    schedule: str = "official"
    recipes: Mapping = MappingProxyType({})


_BUNDLED = dict(
    source="bundled",
    splits={
        "train800val200": "train800+val200",
        "train800": "train800",
        "val200": "val200",
        "test": "test",
    },
    schedule="cosine",
)


# Chosen on val200, mean of three seeds (--config.protocol=tune --config.seeds="(0,1,2)").
def _tuned(lr, weight_decay=1e-4, **kwargs):
    return dict(lr=lr, weight_decay=weight_decay, drop_path=0.0, **kwargs)


TASKS = {
    "hearts": Task(
        **_BUNDLED,
        classes=16,
        num_test=2000,
        epochs=12,
        recipes={
            "linear": _tuned(0.02, 0.03, epochs=36),  # cheap epochs, to convergence
            "rlrr": _tuned(0.02),
            "full": _tuned(1e-3),
        },
    ),
    "digits": Task(
        **_BUNDLED,
        classes=10,
        num_test=797,
        epochs=8,
        recipes={"linear": _tuned(0.03), "rlrr": _tuned(0.02), "full": _tuned(5e-4)},
    ),
    "cifar": Task(
        source="tfds",
        tfds="cifar100:3.0.2",
        splits={
            "train800val200": "train[:800]+train[45000:45200]",
            "train800": "train[:800]",
            "val200": "train[45000:45200]",
            "test": "test",
        },
        classes=100,
        num_test=10000,
        recipes={"rlrr": dict(lr=3e-3, weight_decay=5e-5, drop_path=0.1)},
    ),
}
BUNDLED = ("hearts", "digits")


def get(name):
    """The task of that name; UserError with the nearest name if there is none."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
