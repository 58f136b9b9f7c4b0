"""Functions that read weights and images for the runs of a suite, each once."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from rlrr_jax import lookup, run_images, run_model
from rlrr_jax.data import folds, store
from rlrr_jax.data.task import Task


def weights_reader(weights: dict[str, tuple[str, str]], say: Callable[[str], None]) -> Callable:
    """A function `(run, model) -> frozen` that reads each file once, though heads differ by task.

    Args:
      weights: name -> path and SHA-256.
      say: function that prints a line.
    """
    last: dict = {}  # of one file, which most suites have

    def read(run: Any, model: Any) -> dict:
        path, _ = weights[run.pretrained.name]
        headless = model.clone(num_classes=1)
        key = path, run_images.size_of(run), run.pretrained.to_json(), headless
        if key not in last:
            last.clear()
            last[key] = run_model.load_weights(run, path, headless, note=say)
            for name in lookup.names("weights"):
                if text := lookup.find("weights", name)(last[key]):
                    say(f"warning: {run.pretrained.name} {text}")
        width = len(last[key]["head"]["kernel"])
        head: dict = {"kernel": np.zeros((width, model.num_classes), np.float32)}
        head["bias"] = np.zeros(model.num_classes, np.float32)
        return {**last[key], "head": head}

    return read


def images_reader(most: int) -> Callable:
    """A function that gives images and labels of a split or a fold, and keeps the last so many."""

    @functools.lru_cache(most)
    def load(
        task: Task, split: str, pixels: Any, found: Any, cache_dir: str | None, crop: tuple | None
    ) -> tuple:
        """Where `crop` says so, the crops of a seed."""
        if fold := folds.parse(split):
            images, labels = load(task, fold.whole, pixels, found, cache_dir, crop)
            which = folds.pick(fold, labels)
            return images.picked(which) if crop else folds.Picked(images, which), labels[which]
        if crop:
            return store.load_crops(task, split, pixels, crop, found)
        return store.load_split(task, split, pixels, found, cache_dir)

    return load
