"""What is saved: Orbax checkpoints of a run in progress, the trained tree at its end.

A checkpoint holds the trainable tree, the optimiser state, the metrics of the epoch so far and the
place in the run. Frozen weights are never in it.
"""

import json
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict

from rlrr_jax.errors import UserError


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

    def save_if_due(self, state, metrics, epoch, step, last=False):
        """Saves what is needed to go on before step `step` of `epoch`, whole or not at all."""
        if last or time.monotonic() - self.saved >= self.seconds:
            tree = {"state": state, "metrics": metrics, "place": _place(epoch, step)}
            number = (self.manager.latest_step() or 0) + 1
            self.manager.save(number, args=ocp.args.StandardSave(tree), force=True)
            self.saved = time.monotonic()

    def restore(self, state, metrics):
        """The newest saved `(state, metrics, epoch, step)`, placed like those given; else those.

        Raises UserError if they were saved for other names or shapes.
        """
        number = self.manager.latest_step()
        if number is None:
            return state, metrics, 0, 0
        like = {"state": state, "metrics": metrics, "place": _place(0, 0)}
        self._check(number, like)
        found = self.manager.restore(number, args=ocp.args.StandardRestore(like))
        return found["state"], found["metrics"], *(int(i) for i in found["place"])

    def _check(self, number, like):
        saved = _shapes(self.manager.item_metadata(number))
        wanted = _shapes(like)
        names = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
        if names:
            raise UserError(
                f"the checkpoint in {self.manager.directory} has other arrays than this run "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): choose another "
                f"--workdir"
            )


def _place(epoch, step):
    return np.array([epoch, step], np.int32)


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
    path = epath.Path(path)
    part = path.parent / (path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
