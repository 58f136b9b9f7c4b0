"""The 19 tasks of VTAB-1k, with the authors' recipes.

Sources: VTAB (Zhai et al., 2019; github.com/google-research/task_adaptation) for splits and labels,
the authors' VTABConfig.py for the recipes. Split positions are VTAB's percentages of the known sizes.
"""

from typing import Any

import numpy as np

from rlrr_jax.data.task import Task, field, splits


def count_objects(example: dict) -> int:
    """clevr_count: 3 to 10 objects are classes 0 to 7."""
    return len(example["objects"]["size"]) - 3


def nearest_object(example: dict) -> int:
    """clevr_dist: the smallest pixel depth, in 6 bins (0, 8], (8, 8.5], ... (10, 100]."""
    depths = np.asarray(example["objects"]["pixel_coords"], np.float32).reshape(-1, 3)[:, 2]
    return _bin(depths.min(initial=np.inf), (0, 8, 8.5, 9, 9.5, 10, 100))


def nearest_vehicle(example: dict) -> int:
    """kitti: the nearest car, van or truck up to 8 m, 20 m, farther, or none at all: 0 to 3."""
    objects = example["objects"]
    vehicle = np.asarray(objects["type"], int) < 3
    depths = np.asarray(objects["location"], np.float32).reshape(-1, 3)[:, 2]
    return _bin(depths[vehicle].min(initial=1000), (-100, 8, 20, 999))


def _bin(value, edges):
    """The last edge strictly below the value."""
    return int(np.sum(np.asarray(edges) < value)) - 1


def position_bin(example: dict) -> Any:
    """dsprites_loc: 32 x positions in 16 classes."""
    return example["label_x_position"] // 2


def orientation_bin(example: dict) -> Any:
    """dsprites_ori: 40 orientations in 16 classes of three and two values in turn."""
    return 2 * example["label_orientation"] // 5


def _vtab(group, dataset, val, classes, num_test, recipe, **kwargs):
    """A VTAB task; `recipe` is the authors' learning rate, weight decay and drop path for RLRR."""
    name, version = dataset.split(":")
    return Task(
        name="",  # filled in below
        group=group,
        splits=splits("train[:800]", val, kwargs.pop("test", "test")),
        classes=classes,
        num_test=num_test,
        tfds=name,
        version=version,
        majors=(int(version[0]), *kwargs.pop("majors", ())),
        recipes={"rlrr": dict(zip(("lr", "weight_decay", "drop_path"), recipe))},
        **kwargs,
    )


_N, _P, _S = "natural", "specialized", "structured"
_VAL = "validation[:200]"
_CLEVR = (_S, "clevr:3.1.0", "train[63000:63200]")
_DSPRITES = (_S, "dsprites:2.0.0", "train[589824:590024]")
_NORB = (_S, "smallnorb:2.0.0", "test[:200]")
_DSPRITES_KW = dict(test="train[663552:]", side=64, scale=255)  # stored as 0 and 1
_NORB_KW = dict(test="test[50%:]", side=96)

# fmt: off
_TASKS = {
    "cifar": _vtab(_N, "cifar100:3.0.2", "train[45000:45200]", 100, 10000, (3e-3, 5e-5, 0.1), side=32),
    "caltech101": _vtab(_N, "caltech101:3.0.2", "train[2754:2954]", 102, 6084, (1e-3, 5e-5, 0.1)),
    "dtd": _vtab(_N, "dtd:3.0.1", _VAL, 47, 1880, (2e-3, 5e-5, 0.1), flip=True),
    "oxford_flowers102": _vtab(
        _N, "oxford_flowers102:2.1.1", _VAL, 102, 6149, (3e-3, 5e-2, 0.3)),
    "oxford_iiit_pet": _vtab(
        _N, "oxford_iiit_pet:4.0.0", "train[2944:3144]", 37, 3669, (1e-3, 5e-5, 0.1), majors=(3,),
        flip=True),
    "svhn": _vtab(
        _N, "svhn_cropped:3.1.0", "train[65931:66131]", 10, 26032, (5e-3, 5e-5, 0.3), side=32),
    "sun397": _vtab(_N, "sun397/tfds:4.0.0", _VAL, 397, 21750, (1e-3, 5e-5, 0.1)),
    "patch_camelyon": _vtab(
        _P, "patch_camelyon:2.0.0", _VAL, 2, 32768, (3e-3, 5e-2, 0.3), side=96, flip=True),
    "eurosat": _vtab(
        _P, "eurosat/rgb:2.0.0", "train[16200:16400]", 10, 5400, (1e-3, 5e-5, 0.1),
        test="train[21600:]", side=64, flip=True),
    "resisc45": _vtab(
        _P, "resisc45:3.0.0", "train[18900:19100]", 45, 6300, (3e-3, 5e-5, 0.0), test="train[25200:]"),
    "diabetic_retinopathy": _vtab(
        _P, "diabetic_retinopathy_detection/btgraham-300:3.0.0", _VAL, 5, 42670, (5e-3, 5e-5, 0.1),
        flip=True),
    "clevr_count": _vtab(
        *_CLEVR, 8, 15000, (5e-3, 5e-5, 0.5), test="validation", label=count_objects,
        rule="number of objects, 1",
        fields=("objects",), flip=True, names=tuple(f"{n} objects" for n in range(3, 11))),
    "clevr_dist": _vtab(
        *_CLEVR, 6, 15000, (1e-2, 5e-5, 0.2), test="validation", label=nearest_object,
        rule="nearest object, 1",
        fields=("objects",), flip=True,
        names=("to 8", "to 8.5", "to 9", "to 9.5", "to 10", "beyond 10")),
    "dmlab": _vtab(_S, "dmlab:2.0.1", _VAL, 6, 22735, (5e-3, 5e-5, 0.3), flip=True),
    "kitti": _vtab(
        _S, "kitti:3.3.0", _VAL, 4, 711, (3e-3, 5e-2, 0.3), label=nearest_vehicle,
        rule="nearest vehicle, 1", fields=("objects",),
        flip=True, names=("to 8 m", "to 20 m", "beyond 20 m", "no vehicle")),
    "dsprites_loc": _vtab(
        *_DSPRITES, 16, 73728, (1e-2, 5e-5, 0.1), label=position_bin,
        rule="position, 1", fields=("label_x_position",),
        **_DSPRITES_KW),
    "dsprites_ori": _vtab(
        *_DSPRITES, 16, 73728, (5e-3, 5e-5, 0.1), label=orientation_bin,
        rule="orientation, 1", fields=("label_orientation",),
        **_DSPRITES_KW),
    "smallnorb_azi": _vtab(
        *_NORB, 18, 12150, (5e-3, 5e-2, 0.3), label=field("label_azimuth"),
        rule="azimuth, 1", fields=("label_azimuth",),
        **_NORB_KW),
    "smallnorb_ele": _vtab(
        *_NORB, 9, 12150, (1e-3, 5e-5, 0.3), label=field("label_elevation"),
        rule="elevation, 1",
        fields=("label_elevation",), flip=True, **_NORB_KW),
}
# fmt: on
VTAB = {name: task._replace(name=name) for name, task in _TASKS.items()}
GROUPS = {
    group: tuple(name for name, task in VTAB.items() if task.group == group) for group in (_N, _P, _S)
}
