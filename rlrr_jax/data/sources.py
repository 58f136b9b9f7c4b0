"""Where images come from: bundled files, or tfds datasets prepared on disk. No TensorFlow."""

import pathlib

import numpy as np
from etils import epath

from rlrr_jax.errors import UserError, first_line

BUNDLED = pathlib.Path(__file__).parents[1] / "bundled"


def open_split(name, task, split, data_dir=None):
    """The examples of a split, in the order of the source.

    Args:
      name: of the task.
      task: its `tasks.Task`.
      split: "train800", "val200", "train800val200" or "test".
      data_dir: folder of tfds datasets; None is tfds's own default.

    Returns:
      A function `(start, stop) -> list of (image, label)` and the number of examples; an image is
      encoded bytes or an array [H, W] or [H, W, 3] of uint8.

    Raises:
      UserError: if the dataset has not been prepared.
    """
    if task.source == "bundled":
        return _bundled(name, task.splits[split])
    read, number = _tfds(task, task.splits[split], data_dir)
    if split == "test" and number != task.num_test:
        raise UserError(
            f"{name} has {number} test images instead of {task.num_test}: prepare the dataset again"
        )
    return read, number


def _bundled(name, parts):
    with np.load(BUNDLED / f"{name}.npz", allow_pickle=False) as file:
        images = np.concatenate([file[f"{part}/images"] for part in parts.split("+")])
        labels = np.concatenate([file[f"{part}/labels"] for part in parts.split("+")])
    return lambda start, stop: list(zip(images[start:stop], labels[start:stop])), len(labels)


def _tfds(task, split, data_dir):
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    name, version = task.tfds.split(":")
    folder = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name / version
    if not (folder / "dataset_info.json").exists():
        raise UserError(
            f"there is no prepared tfds dataset at {folder}: point config.data.dir at the folder "
            f"that holds {name}/{version}, or prepare it on a machine with TensorFlow by "
            f"tfds.builder('{task.tfds}', file_format='array_record').download_and_prepare()"
        )
    try:
        builder = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split, decoders={task.image_key: tfds.decode.SkipDecoding()})
    except NotImplementedError as e:
        raise UserError(
            f"{folder} is stored as {builder.info.file_format.value}, which cannot be read without "
            f"TensorFlow: prepare it with file_format='array_record'"
        ) from e
    except Exception as e:  # tfds's parsers, splits and readers each have their own
        raise UserError(
            f"{folder} has no readable split {split!r} ({first_line(e)}): prepare it again"
        ) from e

    def read(start, stop):
        try:
            examples = source.__getitems__(list(range(start, stop)))
            return [(e[task.image_key], e[task.label_key]) for e in examples]
        except Exception as e:  # a record that is cut off is None
            raise UserError(
                f"{folder}, split {split!r}: cannot read examples {start} to {stop - 1} "
                f"({first_line(e)}); prepare it again"
            ) from e

    return read, len(source)
