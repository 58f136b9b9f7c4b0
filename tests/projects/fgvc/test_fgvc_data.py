"""FGVC's five tasks, on small folders laid out as the official ones are."""

import hashlib
import json

import numpy as np
import pytest
import scipy.io
from PIL import Image

from rlrr_jax import config as config_lib
from rlrr_jax import suite
from rlrr_jax.configs import fgvc as config_fgvc
from rlrr_jax.data import decoding, sources, store, tasks
from rlrr_jax.errors import UserError
from rlrr_jax.projects.fgvc import data as fgvc

PLACES = {name: layout.folder for name, layout in fgvc.LAYOUTS.items()}
LABELS = np.array([0, 1, 2] * 8)  # of 24 images, the last 6 tested on
TESTED = np.arange(24) >= 18


def picture(path, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 60, (20 + i, 30, 3)) + 60 * int(LABELS[i])
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def cells(values):
    """A column of a MATLAB cell array."""
    out = np.empty((len(values), 1), object)
    out[:, 0] = values
    return out


def write_birds(root, ids, numbers):
    """`ids` of images; `numbers` of the three classes among others."""
    names = {1: "root", **{n: f"{n:03d}.Bird_{k}" for k, n in enumerate(numbers)}}
    paths = [f"{names[numbers[k]]}/{i:04d}.jpg" for i, k in enumerate(LABELS)]
    for i, path in enumerate(paths):
        picture(root / "images" / path, i)
    write = lambda name, rows: (root / name).write_text("".join(f"{a} {b}\n" for a, b in rows))
    write("images.txt", zip(ids, paths))
    write("image_class_labels.txt", zip(ids, (numbers[k] for k in LABELS)))
    write("train_test_split.txt", zip(ids, (~TESTED).astype(int)))
    write("classes.txt", names.items())


def write_cub(root):
    write_birds(root, range(1, 25), [1, 2, 3])


def write_nabirds(root):
    write_birds(root, [f"{i:08x}-aa" for i in range(24)], [295, 817, 1010])


def write_flowers(root):
    for i in range(24):
        picture(root / f"jpg/image_{i + 1:05d}.jpg", i)
    scipy.io.savemat(root / "imagelabels.mat", {"labels": LABELS[None] + 1})
    number = np.arange(1, 25)[None]
    sets = {"trnid": number[:, :12], "valid": number[:, 12:18], "tstid": number[:, 18:]}
    scipy.io.savemat(root / "setid.mat", sets)


def write_dogs(root):
    paths = [f"n0208562{k}-Breed_{k}/n0208562{k}_{i}.jpg" for i, k in enumerate(LABELS)]
    for i, path in enumerate(paths):
        picture(root / "Images" / path, i)
    for name, part in (("train_list.mat", ~TESTED), ("test_list.mat", TESTED)):
        some = [path for path, there in zip(paths, part) if there]
        scipy.io.savemat(root / name, {"file_list": cells(some), "labels": LABELS[part][:, None] + 1})


def write_cars(root):
    (root / "devkit").mkdir(parents=True)
    names = np.empty((1, 3), object)
    names[0] = ["AM General Hummer", "Acura RL", "BMW M3"]
    scipy.io.savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    for place, part, file in (
        ("cars_train", ~TESTED, "cars_train_annos.mat"),
        ("cars_test", TESTED, "cars_test_annos_withlabels.mat"),
    ):
        rows = np.empty((1, part.sum()), [("bbox_x1", object), ("class", object), ("fname", object)])
        for n, i in enumerate(np.flatnonzero(part)):
            picture(root / f"{place}/{n + 1:05d}.jpg", i)
            rows[0, n] = (3, int(LABELS[i]) + 1, f"{n + 1:05d}.jpg")
        scipy.io.savemat(root / f"devkit/{file}", {"annotations": rows})


WRITE = {
    "cub": write_cub,
    "nabirds": write_nabirds,
    "flowers_fgvc": write_flowers,
    "dogs": write_dogs,
    "cars": write_cars,
}
NAMES = {
    "cub": ["001.Bird_0", "002.Bird_1", "003.Bird_2"],
    "nabirds": ["295.Bird_0", "817.Bird_1", "1010.Bird_2"],
    "flowers_fgvc": ["0", "1", "2"],
    "dogs": ["Breed_0", "Breed_1", "Breed_2"],
    "cars": ["AM General Hummer", "Acura RL", "BMW M3"],
}


@pytest.fixture
def small(monkeypatch):
    """The tasks with 12, 6 and 6 images of three classes."""
    for name, task in fgvc.FGVC.items():
        sizes = {"train": 12, "val": 6, "train+val": 18}
        monkeypatch.setitem(tasks.TASKS, name, task._replace(classes=3, num_test=6, sizes=sizes))
    return tasks.TASKS


@pytest.mark.parametrize("name", fgvc.FGVC)
def test_official_folders(name, small, tmp_path):
    root = tmp_path / PLACES[name]
    root.mkdir()
    WRITE[name](root)
    task = small[name]
    found = sources.find(task, tmp_path)
    assert (found.kind, found.dataset) == ("folder", f"fgvc/{name}") and found.path == root
    assert sources.class_names(task, found) == NAMES[name]
    seen = {}
    for split, number in (("train", 12), ("val", 6), ("train+val", 18), ("test", 6)):
        images, labels = store.load_split(task, split, decoding.Pixels(24), found, tmp_path / "cache")
        assert images.shape == (number, 24, 24, 3) and len(labels) == number
        means = np.asarray(images[:]).mean((1, 2, 3))
        np.testing.assert_array_equal(means // 60, labels)  # pictures are as bright as their class
        seen[split] = [im.path for im in fgvc.divided(task, root)[split]]
    assert sorted(seen["train"] + seen["val"]) == sorted(seen["train+val"])
    assert not set(seen["train+val"]) & set(seen["test"])
    if name == "flowers_fgvc":  # which has official ones
        assert sorted(seen["val"]) == [f"jpg/image_{i:05d}.jpg" for i in range(13, 19)]
        return
    order = sorted(seen["train+val"], key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    assert set(seen["val"]) == set(order[:6])


@pytest.mark.parametrize("name", ["cub", "dogs", "flowers_fgvc"])
def test_vpts_lists_say_what_is_chosen_on(name, small, tmp_path):
    root = tmp_path / PLACES[name]
    root.mkdir()
    WRITE[name](root)
    task = small[name]
    every = [image.path for image in fgvc.divided(task, root)["train+val"]]
    chosen, base = every[::3], {"cub": "images/", "dogs": "Images/"}.get(name, "")
    (root / "val.json").write_text(json.dumps({path.removeprefix(base): 7 for path in chosen}))
    parts = fgvc.divided(task, root)
    assert sorted(image.path for image in parts["val"]) == sorted(chosen) and len(parts["train"]) == 12
    (root / "val.json").write_text(json.dumps({"x/y.jpg": 0}))
    with pytest.raises(UserError, match="val.json names x/y.jpg, which is no official training image"):
        fgvc.divided(task, root)


def test_what_is_missing_is_said(small, tmp_path):
    with pytest.raises(
        UserError, match=r"there is no .*nabirds with images.txt: get it from https://dl"
    ):
        sources.find("nabirds", tmp_path)
    with pytest.raises(UserError, match="nor a prepared tfds dataset .*caltech_birds2011: get it from"):
        sources.find("cub", tmp_path)
    root = tmp_path / "CUB_200_2011"
    root.mkdir()
    write_cub(root)
    found = sources.find("cub", tmp_path)
    (root / "classes.txt").rename(root / "x")
    with pytest.raises(
        UserError, match="there is no .*classes.txt: extract the whole archive of https"
    ):
        sources.open_split("cub", "test", found)
    (root / "x").rename(root / "classes.txt")
    (root / "images/001.Bird_0/0018.jpg").unlink()
    with pytest.raises(UserError, match="there is no .*0018.jpg, which the lists name"):
        sources.open_split("cub", "test", found)
    (root / "images.txt").write_text("1\n")
    with pytest.raises(UserError, match="the lists in .* cannot be read .*: extract them again"):
        sources.open_split("cub", "test", found)


def test_another_number_of_images_is_refused(tmp_path):
    root = tmp_path / "nabirds"
    root.mkdir()
    write_nabirds(root)
    with pytest.raises(UserError, match="nabirds has 6 test images instead of 24633"):
        sources.open_split("nabirds", "test", sources.find("nabirds", tmp_path))


def test_counts_and_recipes_are_the_authors():
    """facts of the RLRR authors' train_fgvc.py and VPT's splits."""
    sizes = {name: (t.classes, t.number("train+val"), t.num_test) for name, t in fgvc.FGVC.items()}
    assert sizes == {
        "cub": (200, 5994, 5794),
        "nabirds": (555, 23929, 24633),
        "flowers_fgvc": (102, 2040, 6149),
        "dogs": (120, 12000, 8580),
        "cars": (196, 8144, 8041),
    }
    runs = {r.task: r for r in config_lib.resolve(config_fgvc.get_config())}
    assert list(runs) == list(fgvc.FGVC)
    for name, lr, drop_path, schedule in (
        ("cub", 3e-3, 0.1, "restarts"),
        ("nabirds", 5e-4, 0.3, "official"),
        ("flowers_fgvc", 3e-3, 0.2, "official"),
        ("dogs", 1e-4, 0.0, "restarts"),
        ("cars", 3e-3, 0.2, "official"),
    ):
        r = runs[name]
        assert (r.lr, r.drop_path, r.schedule, r.epochs) == (lr, drop_path, schedule, 60)
        assert (r.weight_decay, r.flip, r.crop, r.crop_from) == (0.05, True, "square", 256)
        assert r.restarts == ((5, 1) if schedule == "restarts" else None) and r.protocol == "official"
    (run,) = config_lib.resolve(config_fgvc.get_config("augmented,cub"))
    assert (run.mixup, run.cutmix, run.label_smoothing, run.average) == (0.8, 1.0, 0.1, 0.9998)
    assert (run.epochs, run.restarts) == (110, (10, 2))


@pytest.mark.slow
def test_a_run_crops_mixes_and_averages(small, tmp_path):
    """The augmented recipe, with squares cut on the device, from start to a tested result."""
    root = tmp_path / "CUB_200_2011"
    root.mkdir()
    write_cub(root)
    config = config_fgvc.get_config("augmented,cub,method=linear")
    config.model.variant, config.image_size, config.crop_from = "bundled", 32, 40
    config.epochs, config.protocol, config.num_devices, config.average = 2, "fast", 1, 0.5
    config.data.dir, config.data.cache_dir = str(tmp_path), str(tmp_path / "cache")
    (row,), problems = suite.run(config, tmp_path / "w")
    assert not problems and row["num_test"] == 6 and row["crop"] == "square"
    assert row["source"] == "folder" and row["dataset"] == "fgvc/cub"
    stored = sorted((tmp_path / "cache/images").glob("fgvc-cub-*"))
    assert [np.load(p / "images.npy", mmap_mode="r").shape[1] for p in stored] == [40, 40]
