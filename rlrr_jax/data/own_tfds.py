"""A prepared dataset of tfds with an image and a label as a task."""

import re
from typing import Any

import numpy as np
from etils import epath

from rlrr_jax.data import sources
from rlrr_jax.data.division import PARTS, Options
from rlrr_jax.data.examples import some
from rlrr_jax.data.task import Found, Source, Task, epochs_for
from rlrr_jax.errors import UserError

LOOKED_AT = 500  # records of each part of a dataset of tfds


def task(name: str, dataset: str, options: Options, data_dir: Any) -> Task:
    """The task of a prepared tfds dataset with an image and a label: its own train and test split."""
    if options.shots is not None:
        raise UserError(
            f"config.own.shots is not for tfds:{dataset}, only for folders and lists: unset it"
        )
    found = _newest(dataset, data_dir)
    builder, _ = sources.open_tfds(found, "train", ())
    info = builder.info
    features = dict(info.features.items()) if hasattr(info.features, "items") else {}
    field = next((name for name in ("label", "labels") if name in features), "label")
    label = features.get(field)
    several = hasattr(getattr(label, "feature", None), "num_classes")  # a sequence of classes
    if not (several or hasattr(label, "num_classes")) or "image" not in features:
        raise UserError(f"{found.path} has no fields image and label: take a dataset of classification")
    test = next((part for part in ("test", "validation") if part in info.splits), None)
    if test is None or "train" not in info.splits:
        raise UserError(f"{found.path} has only {', '.join(info.splits)}: train and test are needed")
    number = info.splits["train"].num_examples
    kept = number - max(1, round(options.val * number))
    tested = info.splits[test].num_examples
    classes = label.feature.num_classes if several else label.num_classes
    what = "labels" if several else "classes"
    note = f"{number} images to train on, {classes} {what}; {tested} to test on ({test}); "
    note += f"the last {number - kept} of train are chosen on"
    notes = (note, *(() if several else _in_order(found, number, kept, classes)))
    more = _several(found, field, label.feature.names, ("train", test)) if several else {}
    parts = {"train": f"train[:{kept}]", "val": f"train[{kept}:]", "train+val": "train", "test": test}
    return Task(
        name=name,
        group="own",
        splits=parts,
        classes=classes,
        num_test=tested,
        sizes={"train": kept, "val": number - kept, "train+val": number},
        parts=PARTS,
        tfds=dataset,
        epochs=epochs_for(number),
        schedule="cosine",
        flip=True,
        source=Source(lambda *_: found, sources.open_vtab),
        notes=notes,
        **more,
    )


def _several(found, field, names, splits):
    """What a task has besides where an image has a sequence of classes; looks at all labels."""
    every = set()
    for split in splits:
        opened, fetch = sources.open_tfds(found, split, [field])
        number = opened.info.splits[split].num_examples
        for start in range(0, number, LOOKED_AT):
            block = fetch(start, min(start + LOOKED_AT, number))
            every |= {tuple(sorted({int(i) for i in e[field]})) for e in block}
    codes = {several: i for i, several in enumerate(sorted(every))}
    hot = np.zeros((len(codes), len(names)), np.float32)
    for several, i in codes.items():
        hot[i, list(several)] = 1
    return {
        "kind": "labels",
        "names": tuple(names),
        "fields": (field,),
        "rule": f"several of {field}, 1",
        "label": lambda e: codes[tuple(sorted({int(i) for i in e[field]}))],
        "encode": lambda numbers: hot[numbers],
    }


def _in_order(found, number, kept, classes):
    """Warnings for a training split whose parts have other classes, as one in order has."""
    _, fetch = sources.open_tfds(found, "train", ["label"])
    look = lambda first, stop: {
        int(e["label"])
        for i in np.unique(np.linspace(first, stop - 1, min(LOOKED_AT, stop - first)).astype(int))
        for e in fetch(int(i), int(i) + 1)
    }
    train, val = look(0, kept), look(kept, number)
    labels = train | val
    notes = []
    if len(val) < min(len(labels), number - kept) / 2:
        notes.append(
            f"warning: the images to choose on have {len(val)} of {len(labels)} classes, since "
            f"the dataset lies in the order of its classes: prepare it shuffled"
        )
    if number <= LOOKED_AT and (missing := sorted(val - train)):
        names = some(map(str, missing))
        notes.append(f"warning: {len(missing)} classes are chosen on and not trained: {names}")
    if number <= LOOKED_AT and len(labels) < classes:
        notes.append(f"note: {classes - len(labels)} of {classes} classes have no training image")
    return notes


def _newest(dataset, data_dir):
    """Where the newest prepared version of a tfds dataset is."""
    folder = epath.Path(data_dir or "~/tensorflow_datasets").expanduser() / dataset
    there = folder.iterdir() if folder.exists() else ()
    versions = [p for p in there if (p / "dataset_info.json").exists()]
    if not versions:
        raise UserError(
            f"there is no prepared tfds dataset {folder}: prepare it by tfds, or set config.data.dir"
        )
    newest = max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    return Found("tfds", newest, f"{dataset}:{newest.name}")
