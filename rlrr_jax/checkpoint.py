"""Orbax checkpoints of a run in progress.

A checkpoint holds the trainable tree, the optimiser state, the metrics of the epoch so far and the
place in the run. Frozen weights are never in it.
"""

import contextlib
import sys
import threading
import time
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlrr_jax import distributed, files
from rlrr_jax.errors import UserError, first_line


def open_manager(folder):
    """An Orbax CheckpointManager that keeps the last two checkpoints; writing is synchronous.

    What has no checksums (a run killed just before they were written) is removed first, so that it can
    push out none that has. Raises UserError if the file of checksums itself has gone.
    """
    folder = epath.Path(folder).absolute()
    if distributed.lead() and folder.exists():
        sums, paths = _sums(folder), list(folder.glob("[0-9]*"))
        if len(paths) > 1 and not sums:  # a kill leaves one at most
            raise UserError(
                f"{folder} has checkpoints without {_sums_file(folder).name} beside it: copy that, "
                f"too, or delete {folder.parent} to start this run again"
            )
        for path in paths:
            if path.name not in sums:
                print(f"warning: checkpoint {path.name} was not finished: removed", file=sys.stderr)
                path.rmtree()
    distributed.wait("checkpoints")
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handlers = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(folder, item_handlers=handlers, options=options)


def _sums_file(folder):
    """Where the CRC-32 of each file of each checkpoint is: beside Orbax's folder."""
    return epath.Path(folder).parent / "checkpoints.json"


def _sums(folder):
    path = _sums_file(folder)
    return files.read_json(path) if path.exists() else {}


class Keeper:
    """Saves a run at most every so many seconds, and finds where it stopped.

    Args:
      manager: see `open_manager`.
      seconds: time between two checkpoints.
      pack: function that leaves out of a tree what needs not be saved.
    """

    def __init__(self, manager, seconds, pack=lambda tree: tree):
        self.manager, self.seconds, self.pack = manager, seconds, pack
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
        state, metrics = self.pack(state), self.pack(metrics)
        tree = {"state": state, "metrics": metrics, "place": np.asarray(place, np.float64)}
        try:
            with _silent_threads():
                self.manager.save(number, args=ocp.args.StandardSave(tree), force=True)
            if distributed.lead():
                folder = self.manager.directory
                kept = map(str, self.manager.all_steps())
                sums = {n: old for n in kept if (old := _sums(folder).get(n))}
                sums[str(number)] = self._checksums(number)
                files.write_json(_sums_file(folder), sums)
            distributed.wait("saved")
        except Exception as e:  # Orbax wraps a full disk in several ways
            raise UserError(
                f"cannot save a checkpoint in {self.manager.directory} ({first_line(e)}): make space "
                f"there and start again"
            ) from e
        self.saved = time.monotonic()
        if self.seconds:  # saving a large tree must not take more than a twentieth of the time
            self.seconds = max(self.seconds, 20 * (self.saved - begun))

    def restore(self, like, places):
        """The newest whole `(state, metrics, place)`; None if nothing was saved.

        A damaged one is passed over for the one before it, with a warning. Process 0 looks, and all
        take what it found.

        Args:
          like: `(state, metrics)` as arrays or as shapes with shardings.
          places: length of the place.

        Raises UserError if none is whole or was saved for these names, shapes and dtypes.
        """
        state, metrics = like
        like = {"state": state, "metrics": metrics, "place": np.zeros(places)}
        number, problems = distributed.agree(self._newest(like) if distributed.lead() else None)
        if number is None and problems:
            raise UserError(
                f"no checkpoint in {self.manager.directory} can be read ({problems[0]}): delete "
                f"{self.manager.directory.parent} to start this run again"
            )
        if number is None:
            return None
        if problems and distributed.lead():
            print(f"warning: {problems[0]}: the one before it is taken", file=sys.stderr, flush=True)
        found = self.manager.restore(number, args=ocp.args.StandardRestore(like))
        return found["state"], found["metrics"], np.asarray(found["place"])

    def _newest(self, like):
        """Number of the newest checkpoint that is whole, None if there is none, and what is wrong."""
        sums, problems = _sums(self.manager.directory), []
        for number in sorted(self.manager.all_steps(), reverse=True):
            try:
                self._check(number, sums[str(number)], like)
                return number, problems
            except Exception as e:  # a damaged file can raise anything
                problems.append(f"checkpoint {number} {first_line(e)}")
        return None, problems

    def _check(self, number, sums, like):
        """ValueError unless every file is as it was written, and the arrays are this run's."""
        found = self._checksums(number)
        if wrong := sorted(name for name, value in sums.items() if found.get(name) != value):
            raise ValueError(f"is damaged (its file {wrong[0]})")
        saved, wanted = _shapes(self.manager.item_metadata(number)), _shapes(like)
        if names := [k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k)]:
            raise ValueError(f"is another run's (its array {min(names)})")

    def _checksums(self, number):
        folder = epath.Path(self.manager.directory) / str(number)
        name = lambda path: str(path)[len(str(folder)) + 1 :]
        return {name(path): zlib.crc32(path.read_bytes()) for path in _all_files(folder)}


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


def _all_files(folder):
    """Every file below a folder; epath has no recursive glob, for gs://'s sake."""
    for path in folder.iterdir():
        yield from _all_files(path) if path.is_dir() else (path,)


def _shapes(tree):
    """Names of leaves, however their containers are kept, and their shapes and dtypes."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name(path): (tuple(x.shape), str(np.dtype(x.dtype))) for path, x in leaves}
