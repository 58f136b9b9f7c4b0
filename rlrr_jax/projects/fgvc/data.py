"""FGVC, five fine-grained tasks, from their official folders or from tfds.

RLRR's protocol trains on the official training images (of Flowers on its validation images, too) and
tests on the official test images. Images to choose on are those of VPT's `<folder>/val.json` (`{path:
class}`) where it is there, else the official ones of Flowers, else the first of the training images by
SHA-256 of their paths, as many as VPT has.

Stanford Dogs are images of ImageNet, which every public backbone has seen with their labels, the test
images, too; CUB-200 shares some.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from rlrr_jax.data import sources
from rlrr_jax.data.task import Found, Source, Split, Task, stamp
from rlrr_jax.errors import UserError, first_line


class Image(NamedTuple):
    """An image of an official folder.

    Attributes:
      path: below the folder.
      label: class, counted from 0.
      split: "train", "val" or "test", as it is officially.
    """

    path: str
    label: int
    split: str


# Official folders -----------------------------------------------------------------------------


def birds(folder: Any) -> tuple[list[Image], list[str]]:
    """CUB-200-2011 and NABirds: `images.txt`, `image_class_labels.txt`, `train_test_split.txt`.

    Args:
      folder: where these files and `images/` are.

    Returns:
      The images, and the names of the classes. Of NABirds' tree of classes only those with images.
    """
    paths, labels, train = (
        dict(
            line.split(maxsplit=1) for line in (folder / name).read_text().splitlines() if line.strip()
        )
        for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    names = dict(
        line.split(maxsplit=1)
        for line in (folder / "classes.txt").read_text().splitlines()
        if line.strip()
    )
    numbers = sorted(set(labels.values()), key=int)
    index = {number: i for i, number in enumerate(numbers)}
    images = [
        Image(f"images/{path.strip()}", index[labels[i]], ("test", "train")[int(train[i])])
        for i, path in paths.items()
    ]
    return images, [names[number].strip() for number in numbers]


def flowers(folder: Any) -> tuple[list[Image], list[str]]:
    """Oxford Flowers-102: `setid.mat`, `imagelabels.mat`, `jpg/`; its classes have no names."""
    labels = _mat(folder / "imagelabels.mat")["labels"].ravel()
    sets = _mat(folder / "setid.mat")
    images = [
        Image(f"jpg/image_{i:05d}.jpg", int(labels[i - 1]) - 1, split)
        for split, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
        for i in sets[name].ravel().tolist()
    ]
    return images, [str(i) for i in range(int(labels.max()))]


def dogs(folder: Any) -> tuple[list[Image], list[str]]:
    """Stanford Dogs: `train_list.mat`, `test_list.mat` and `Images/`."""
    images = []
    for split in ("train", "test"):
        found = _mat(folder / f"{split}_list.mat")
        paths = [str(path.item()) for path in found["file_list"].ravel()]
        labels = found["labels"].ravel()
        images += [Image(f"Images/{p}", int(k) - 1, split) for p, k in zip(paths, labels)]
    names = {image.label: image.path.split("/")[1].partition("-")[2] for image in images}
    return images, [names[i] for i in sorted(names)]


def cars(folder: Any) -> tuple[list[Image], list[str]]:
    """Stanford Cars: `cars_train/`, `cars_test/`, and the lists of `devkit/` with the test labels."""
    images, devkit = [], folder / "devkit"
    for split, name in (("train", "annos"), ("test", "annos_withlabels")):
        file = f"cars_{split}_{name}.mat"
        path = next((p for p in (devkit / file, folder / file) if p.exists()), devkit / file)
        rows = _mat(path)["annotations"].ravel()
        labels = [(str(row["fname"].item()), int(row["class"].item()) - 1) for row in rows]
        images += [Image(f"cars_{split}/{file}", label, split) for file, label in labels]
    names = _mat(devkit / "cars_meta.mat")["class_names"].ravel()
    return images, [str(name.item()) for name in names]


def _mat(path: Any) -> dict:
    """The variables of a MATLAB file."""
    import scipy.io

    with path.open("rb") as file:
        return scipy.io.loadmat(file)


# Tasks ----------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How a dataset is laid out officially.

    Attributes:
      folder: its official name.
      read: function of the folder, to images and names of classes.
      marker: a file that is in it.
      page: where it comes from.
      roots: folders that paths of VPT's lists may start from.
    """

    folder: str
    read: Callable
    marker: str
    page: str
    roots: tuple[str, ...]


LAYOUTS = {
    "cub": Layout(
        "CUB_200_2011", birds, "images.txt", "https://data.caltech.edu/records/65de6-vp158", ("images",)
    ),
    "nabirds": Layout(
        "nabirds", birds, "images.txt", "https://dl.allaboutbirds.org/nabirds", ("images",)
    ),
    "flowers_fgvc": Layout(
        "oxford_flowers",
        flowers,
        "setid.mat",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        ("", "jpg"),
    ),
    "dogs": Layout(
        "stanford_dogs",
        dogs,
        "train_list.mat",
        "http://vision.stanford.edu/aditya86/ImageNetDogs",
        ("Images", ""),
    ),
    "cars": Layout(
        "stanford_cars",
        cars,
        "devkit/cars_meta.mat",
        "https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset",
        ("", "cars_train", "cars_test"),
    ),
}


def find(task: Task, data_dir: Any, kind: str | None) -> Found:
    """The official folder below `data_dir`, or a prepared tfds dataset; UserError if there is none."""
    layout = LAYOUTS[task.name]
    root = epath.Path(data_dir or "~/tensorflow_datasets").expanduser()
    places = [root / layout.folder, root / "fgvc" / layout.folder, root / "fgvc" / task.name, root]
    folder = next((place for place in places if (place / layout.marker).exists()), None)
    if folder is not None and kind in (None, "folder"):
        return Found("folder", folder, f"fgvc/{task.name}")
    if task.tfds and kind in (None, "tfds"):
        for version in sources.versions(root / task.tfds, task):
            return Found("tfds", root / task.tfds / version, f"{task.tfds}:{version}")
    if task.name == "cars" and any((p / "cars_train").exists() for p in places):
        raise UserError(
            f"{root} has cars_train, and not devkit/cars_meta.mat and cars_test_annos_withlabels.mat, "
            f"which are not in that archive: put both there"
        )
    also = f" nor a prepared tfds dataset {root / task.tfds}" if task.tfds else ""
    raise UserError(
        f"there is no {places[0]} with {layout.marker}{also}: get it from {layout.page}, and point "
        f"config.data.dir at the folder that has it"
    )


def open(task: Task, split: str, found: Found) -> Split:
    """The examples of a split."""
    if found.kind == "tfds":
        return sources.open_vtab(task, split, found)
    images = _placed(divided(task, found.path)[split], found.path)

    def read(start: int, stop: int | None) -> list:
        return [((found.path / i.path).read_bytes(), (i.label,)) for i in images[start:stop]]

    digest = hashlib.sha256()
    for image in images:
        path = found.path / image.path
        if not path.exists():
            raise UserError(f"there is no {path}, which the lists name: extract the whole archive")
        digest.update(repr((image, stamp(path))).encode())
    key = {"folder": str(found.path), "list": digest.hexdigest()}
    return Split(len(images), (task.name,), read, key, lambda i: str(found.path / images[i].path))


def _placed(images: list[Image], folder: Any) -> list[Image]:
    """Images with the paths that they have: some archives have their folder once more in itself.

    Raises UserError for a list that leads out of its folder.
    """
    if not images:
        return images
    for image in images:
        path = pathlib.PurePosixPath(image.path)
        if (
            path.is_absolute()
            or not path.parts
            or ".." in path.parts
            or re.search(r"[\\\0]", image.path)
        ):
            raise UserError(f"the lists in {folder} name {image.path}, which leads out of it")
    top = pathlib.PurePosixPath(images[0].path).parts[0]
    if (folder / images[0].path).exists() or not (folder / top / top).is_dir():
        return images
    return [image._replace(path=f"{image.path.partition('/')[0]}/{image.path}") for image in images]


def names(task: Task, found: Found) -> list[str]:
    """Names of the classes in an official folder."""
    return _read(task.name, found.path)[1]


def divided(task: Task, folder: Any) -> dict[str, list[Image]]:
    """The images of each split."""
    images, _ = _read(task.name, folder)
    train = [image for image in images if image.split != "test"]
    official = {image.path for image in train if image.split == "val"}
    chosen = _of_vpt(task, folder, train) or official or _first(task, train)
    return {
        "train": [image for image in train if image.path not in chosen],
        "val": [image for image in train if image.path in chosen],
        "train+val": train,
        "test": [image for image in images if image.split == "test"],
    }


def _read(name: str, folder: Any) -> tuple[list[Image], list[str]]:
    """The images and classes of an official folder; UserError for lists that cannot be read."""
    layout = LAYOUTS[name]
    try:
        return layout.read(folder)
    except FileNotFoundError as e:
        raise UserError(f"there is no {e.filename}: extract the whole archive of {layout.page}") from e
    except UserError:
        raise
    except Exception as e:  # SciPy's and lists that lack something
        why = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"the lists in {folder} cannot be read ({why}): extract them again") from e


def _first(task: Task, train: list[Image]) -> set[str]:
    """Paths of the images to choose on: the first by SHA-256 of their paths."""
    digest = lambda image: hashlib.sha256(image.path.encode()).hexdigest()
    return {image.path for image in sorted(train, key=digest)[: task.number("val")]}


def _of_vpt(task: Task, folder: Any, train: list[Image]) -> set[str]:
    """Paths of the images in VPT's `val.json`; none if it is not there."""
    path = folder / "val.json"
    if not path.exists():
        return set()
    known, found = {image.path for image in train}, set()
    try:
        listed = list(json.loads(path.read_bytes().decode("utf-8-sig")))
        if not all(isinstance(key, str) for key in listed):
            raise ValueError("it lists no paths")
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({first_line(e)}): copy it again, or remove it") from e
    for key in listed:
        places = [pathlib.PurePosixPath(root, key).as_posix() for root in LAYOUTS[task.name].roots]
        place = next((place for place in places if place in known), None)
        if place is None:
            raise UserError(
                f"{path} names {key}, which is no official training image: correct or remove it"
            )
        found.add(place)
    return found


COMMON = dict(crop="square", crop_from=256, warmup_epochs=10)  # of the recipe, for all methods


def _task(name, numbers, classes, num_test, recipe, tfds="", **kwargs):
    """A task with the recipe of the authors' train_fgvc.py: 50 epochs and 10 at the smallest rate."""
    dataset, _, version = tfds.partition(":")
    train, val = numbers
    official = {"train": f"train[:{train}]", "val": f"train[{train}:]", "train+val": "train"}
    lr, drop_path = recipe
    return Task(
        name=name,
        group="fgvc",
        splits={**official, "test": "test", **kwargs.pop("splits", {})},
        classes=classes,
        num_test=num_test,
        tfds=dataset,
        version=version,
        majors=(int(version[0]),) if version else (),
        sizes={"train": train, "val": val, "train+val": train + val},
        parts=("train", "val", "train+val"),
        flip=True,
        epochs=60,
        recipes={"rlrr": dict(lr=lr, weight_decay=0.05, drop_path=drop_path)},
        extra={**COMMON, **kwargs.pop("extra", {})},
        source=Source(find, open, names),
        **kwargs,
    )


_RESTARTS = dict(schedule="restarts", restarts=(5, 1))
_SEEN = "note: {} of its images are in ImageNet, which the backbone has seen, perhaps with their labels"
FGVC = {
    "cub": _task(
        "cub",
        (5394, 600),
        200,
        5794,
        (3e-3, 0.1),
        "caltech_birds2011:0.2.0",
        extra=_RESTARTS,
        notes=(_SEEN.format("some"),),
    ),
    "nabirds": _task("nabirds", (21536, 2393), 555, 24633, (5e-4, 0.3)),
    "flowers_fgvc": _task(
        "flowers_fgvc",
        (1020, 1020),
        102,
        6149,
        (3e-3, 0.2),
        "oxford_flowers102:2.1.1",
        splits={"train": "train", "val": "validation", "train+val": "train+validation"},
    ),
    "dogs": _task(
        "dogs",
        (10800, 1200),
        120,
        8580,
        (1e-4, 0.0),
        "stanford_dogs:0.2.0",
        extra=_RESTARTS,
        notes=(_SEEN.format("all"),),
    ),
    "cars": _task("cars", (7329, 815), 196, 8041, (3e-3, 0.2), "cars196:2.1.0"),
}
NAMES = tuple(FGVC)
CUB, NABIRDS, FLOWERS, DOGS, CARS = FGVC.values()
