"""Labels at their edges, names, groups, and what the authors' table says."""

import math

import numpy as np
import pytest

from rlrr_jax.data import tasks, vtab
from rlrr_jax.errors import UserError

AUTHORS = """
cifar 100 3e-3 0.1 5e-5 off
caltech101 102 1e-3 0.1 5e-5 off
dtd 47 2e-3 0.1 5e-5 on
oxford_flowers102 102 3e-3 0.3 5e-2 off
oxford_iiit_pet 37 1e-3 0.1 5e-5 on
svhn 10 5e-3 0.3 5e-5 off
sun397 397 1e-3 0.1 5e-5 off
patch_camelyon 2 3e-3 0.3 5e-2 on
eurosat 10 1e-3 0.1 5e-5 on
resisc45 45 3e-3 0.0 5e-5 off
diabetic_retinopathy 5 5e-3 0.1 5e-5 on
clevr_count 8 5e-3 0.5 5e-5 on
clevr_dist 6 1e-2 0.2 5e-5 on
dmlab 6 5e-3 0.3 5e-5 on
kitti 4 3e-3 0.3 5e-2 on
dsprites_loc 16 1e-2 0.1 5e-5 off
dsprites_ori 16 5e-3 0.1 5e-5 off
smallnorb_azi 18 5e-3 0.3 5e-2 off
smallnorb_ele 9 1e-3 0.3 5e-5 on
"""  # task, classes, lr, drop path, weight decay, flip: VTABConfig.py


def test_recipes_are_the_authors():
    for line, (name, task) in zip(AUTHORS.split("\n")[1:], tasks.VTAB.items(), strict=False):
        known, classes, lr, drop_path, weight_decay, flip = line.split()
        assert (known, int(classes), flip == "on") == (name, task.classes, task.flip)
        assert task.recipes["rlrr"] == {
            "lr": float(lr),
            "weight_decay": float(weight_decay),
            "drop_path": float(drop_path),
        }
        assert (task.epochs, task.schedule) == (110, "official")
    assert len(tasks.VTAB) == 19 and AUTHORS.count("\n") == 20


def test_groups_are_vtabs():
    assert [len(tasks.GROUPS[g]) for g in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert tasks.expand(["all"]) == list(tasks.VTAB)
    assert tasks.expand(["structured", "kitti", "pets"]) == [
        *tasks.GROUPS["structured"],
        "oxford_iiit_pet",
    ]


@pytest.mark.parametrize(
    ("alias", "name"),
    [("cifar100", "cifar"), ("pets", "oxford_iiit_pet"), ("clevr_distance", "clevr_dist")],
)
def test_aliases(alias, name):
    assert tasks.canonical(alias) == name and tasks.get(alias) is tasks.VTAB[name]
    assert not set(tasks.ALIASES) & set(tasks.TASKS)


def test_a_misspelt_task_gets_the_nearest_name():
    with pytest.raises(UserError, match="unknown task 'clever_count': did you mean 'clevr_count'"):
        tasks.expand(["clever_count"])


def last_threshold_below(value, thresholds):
    """VTAB's formulation: the largest i with thresholds[i] < value."""
    return max(i for i, t in enumerate(thresholds) if t < value)


def clevr(depths):
    return {"objects": {"pixel_coords": [np.array([9, 9, d], np.float32) for d in depths]}}


@pytest.mark.parametrize("depth", [0.1, 7.99, 8, 8.01, 8.5, 8.6, 9, 9.5, 9.500001, 10, 10.01, 99, 100])
def test_clevr_distance_is_that_of_the_nearest(depth):
    expected = last_threshold_below(np.float32(depth), [0, 8, 8.5, 9, 9.5, 10, 100])
    assert vtab.nearest_object(clevr([depth, 100.0, depth + 3])) == expected
    assert vtab.nearest_object(clevr([100.0, depth])) == expected


def test_clevr_distance_by_hand():
    edges = {8.0: 0, 8.25: 1, 8.5: 1, 9.0: 2, 9.5: 3, 10.0: 4, 10.5: 5, 100.0: 5}
    assert {d: vtab.nearest_object(clevr([d])) for d in edges} == edges


def test_clevr_count():
    for number in range(3, 11):
        assert vtab.count_objects({"objects": {"size": [0] * number}}) == number - 3


def kitti(*objects):
    return {
        "objects": {
            "type": [t for t, _ in objects],
            "location": [np.array([1, 2, z], np.float32) for _, z in objects],
        }
    }


@pytest.mark.parametrize("z", [-3, 0, 7.99, 8, 8.01, 19.99, 20, 20.01, 150, 998])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_kitti_distance_is_that_of_the_nearest_vehicle(z, kind):
    expected = last_threshold_below(np.float32(z), [-100, 8, 20, 999])
    assert vtab.nearest_vehicle(kitti((kind, z))) == expected
    assert vtab.nearest_vehicle(kitti((3, -50), (kind, z), (7, 1), (0, z + 1))) == expected


def test_kitti_without_vehicles():
    assert vtab.nearest_vehicle(kitti()) == 3
    assert vtab.nearest_vehicle(kitti((3, 5.0), (4, 1.0))) == 3  # a pedestrian, a cyclist
    edges = {8.0: 0, 8.5: 1, 20.0: 1, 20.5: 2}
    assert {z: vtab.nearest_vehicle(kitti((0, z))) for z in edges} == edges


def test_dsprites_bins():
    for i in range(32):
        assert vtab.position_bin({"label_x_position": i}) == math.floor(i / 2.0)
    bins = [vtab.orientation_bin({"label_orientation": i}) for i in range(40)]
    assert bins == [math.floor(i / 2.5) for i in range(40)]
    assert bins[:25] == [int(c) for c in "0001122233444556667788899"]
    assert np.bincount(bins).tolist() == [3, 2] * 8


def test_tasks_with_the_same_images():
    for a, b in (
        ("clevr_count", "clevr_dist"),
        ("dsprites_loc", "dsprites_ori"),
        ("smallnorb_azi", "smallnorb_ele"),
    ):
        for split in ("train800", "val200", "train800val200", "test"):
            both = [tasks.get(a), tasks.get(b)]
            assert all(tasks.sharing(task, split) == both for task in both)
    for name in ("cifar", "hearts"):
        assert tasks.sharing(tasks.get(name), "test") == [tasks.get(name)]
