"""What is saved: Orbax checkpoints of a run in progress, the trained tree at its end.

A checkpoint holds the trainable tree, the optimiser state, the metrics of the epoch so far and the
place in the run. Frozen weights are never in it.
"""

import contextlib
import json
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict

from rlrr_jax import distributed, files
from rlrr_jax.errors import UserError, first_line


def open_manager(folder):
    """An Orbax CheckpointManager that keeps the last two checkpoints; writing is synchronous."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(
        epath.Path(folder).absolute(), item_handlers=ocp.StandardCheckpointHandler(), options=options
    )


class Keeper:
    """Saves a run at most every so many seconds, and finds where it stopped."""

    def __init__(self, manager, seconds):
        self.manager, self.seconds = manager, seconds
        self.saved = time.monotonic()

    def save_if_due(self, state, metrics, place, last=False):
        """Saves all that is needed to go on at a place, whole or not at all.

        Args:
          place: numbers that say how far the run is, a flat array.
          last: saves even if not enough time has passed.

        Raises UserError if it cannot be written.
        """
        if not distributed.agree(last or time.monotonic() - self.saved >= self.seconds):
            return
        begun = time.monotonic()
        number = (self.manager.latest_step() or 0) + 1
        tree = {"state": state, "metrics": metrics, "place": np.asarray(place, np.float64)}
        try:
            with _silent_threads():
                self.manager.save(number, args=ocp.args.StandardSave(tree), force=True)
        except Exception as e:  # Orbax wraps a full disk in several ways
            raise UserError(
                f"cannot save a checkpoint in {self.manager.directory} ({first_line(e)}): make space "
                f"there and start again"
            ) from e
        self.saved = time.monotonic()
        if self.seconds:  # saving a large tree must not take more than a twentieth of the time
            self.seconds = max(self.seconds, 20 * (self.saved - begun))

    def restore(self, like, places):
        """The newest readable `(state, metrics, place)`; None if nothing was saved.

        Args:
          like: `(state, metrics)` as arrays or as shapes with shardings.
          places: length of the place.

        Raises UserError if none can be read or was saved for these names and shapes.
        """
        state, metrics = like
        like = {"state": state, "metrics": metrics, "place": np.zeros(places)}
        problem = None
        for number in sorted(self.manager.all_steps(), reverse=True):
            try:
                saved, wanted = _shapes(self.manager.item_metadata(number)), _shapes(like)
                names = [k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k)]
                if names:
                    raise ValueError(f"its array {min(names)} is another run's")
                found = self.manager.restore(number, args=ocp.args.StandardRestore(like))
                return found["state"], found["metrics"], np.asarray(found["place"])
            except Exception as e:  # a damaged file can raise anything
                problem = problem or e
        if problem:
            raise UserError(
                f"no checkpoint in {self.manager.directory} can be read ({first_line(problem)}): "
                f"delete that folder to start this run again"
            ) from problem
        return None


@contextlib.contextmanager
def _silent_threads():
    """Keeps threads of Orbax and TensorStore from printing what the main thread raises anyway."""
    hooks = threading.excepthook, sys.excepthook
    threading.excepthook = sys.excepthook = lambda *_: None
    try:
        yield
    except Exception:
        time.sleep(0.5)  # for the last of them
        raise
    finally:
        threading.excepthook, sys.excepthook = hooks


def _shapes(tree):
    """Names of leaves, however their containers are kept, and their shapes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves
    }


def save_adapter(path, trainable, metadata):
    """Writes a trained tree as safetensors, leaves named by their path.

    `metadata` is kept as JSON under one key: with several, the order in the file would be random.
    """
    flat = {k: np.ascontiguousarray(v) for k, v in flatten_dict(trainable, sep="/").items()}
    data = safetensors.numpy.save(flat, metadata={"rlrr_jax": json.dumps(metadata, sort_keys=True)})
    files.write(path, data)
