"""Orbax checkpoints of a run in progress.

A checkpoint holds the trainable tree, the optimiser state, the metrics of the epoch so far, how far the
run is, and a CRC-32 of each of these arrays. Frozen weights are never in it.
"""

import contextlib
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlrr_jax.errors import UserError, first_line
from rlrr_jax.runtime import distributed
from rlrr_jax.runtime.stop import Stop, Stopped


def open_manager(folder: Any) -> ocp.CheckpointManager:
    """An Orbax CheckpointManager that keeps the last two checkpoints; writing is synchronous."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handlers = ocp.StandardCheckpointHandler()
    path = epath.Path(folder).absolute()
    return ocp.CheckpointManager(path, item_handlers=handlers, options=options)


class Keeper:
    """Saves a run at most every so many seconds, or if it is asked to stop; finds where it stopped.

    Args:
      manager: where checkpoints are, see `open_manager`.
      seconds: time between two checkpoints.
      stop: whether to stop.
      pack: function that leaves out of a tree what needs not be saved.
    """

    def __init__(
        self,
        manager: ocp.CheckpointManager,
        seconds: float,
        stop: Stop,
        pack: Callable[[Any], Any] = lambda tree: tree,
    ) -> None:
        self.manager, self.seconds, self.stop, self.pack = manager, seconds, stop, pack
        self.saved = time.monotonic()

    def stop_if_asked(self, progress: Any) -> None:
        """Saves and raises Stopped if a process was asked to stop."""
        if distributed.any_of(self.stop()):
            self.save_if_due(progress, last=True)
            raise Stopped

    def save_if_due(self, progress: Any, last: bool = False) -> None:
        """Saves all that is needed to go on, whole or not at all.

        Args:
          progress: the `train.Progress`.
          last: whether to save even if not enough time has passed.

        Raises UserError if it cannot be written.
        """
        if not distributed.broadcast(last or time.monotonic() - self.saved >= self.seconds):
            return
        begun = time.monotonic()
        numbers = progress.clock.numbers(progress.epoch, progress.step)
        state, metrics = self.pack(progress.saved), self.pack(progress.metrics)
        tree = {"state": state, "metrics": metrics, "numbers": np.asarray(numbers, np.float64)}
        tree["crc32"] = _checksums(tree)
        try:
            with _silent_threads():
                number = (self.manager.latest_step() or 0) + 1
                self.manager.save(number, args=ocp.args.StandardSave(tree), force=True)
        except Exception as e:  # Orbax wraps a full disk in several ways
            raise UserError(
                f"cannot save a checkpoint in {self.manager.directory} ({first_line(e)}): make space "
                f"there and start again"
            ) from e
        self.saved = time.monotonic()
        if self.seconds:  # saving a large tree must not take more than a twentieth of the time
            self.seconds = max(self.seconds, 20 * (self.saved - begun))

    def restore(self, like: tuple, length: int) -> tuple[Any, Any, np.ndarray] | None:
        """The newest whole `(state, metrics, numbers)`; None if nothing was saved.

        A damaged one is passed over for the one before it, with a warning.

        Args:
          like: `(state, metrics)` as arrays or as shapes with shardings.
          length: how many `numbers` there are.

        Raises UserError if none is whole or was saved for these names, shapes and dtypes.
        """
        tree = {"state": like[0], "metrics": like[1], "numbers": np.zeros(length)}
        tree["crc32"] = np.zeros(len(jax.tree.leaves(tree)), np.uint32)
        problems: list[str] = []
        for number in distributed.broadcast(sorted(self.manager.all_steps(), reverse=True)):
            found, problem = self._read(number, tree)
            if problem is None:
                if problems and distributed.is_process_zero():
                    text = f"warning: {problems[0]}: the one before it is taken"
                    print(text, file=sys.stderr)
                return found["state"], found["metrics"], np.asarray(found["numbers"])
            problems.append(f"checkpoint {number} {problem}")
        if problems:
            raise UserError(
                f"no checkpoint in {self.manager.directory} can be read ({problems[0]}): delete "
                f"{self.manager.directory.parent} to start this run again"
            )
        return None

    def _read(self, number: int, like: Any) -> tuple[Any, str | None]:
        """A checkpoint, and what is wrong with it, the same in every process."""
        found: Any = None
        problem = None
        try:
            problem = _other(_shapes(self.manager.item_metadata(number)), _shapes(like))
            if problem is None:
                found = self.manager.restore(number, args=ocp.args.StandardRestore(like))
        except Exception as e:  # a damaged file can raise anything
            problem = f"is damaged ({first_line(e)})"
        if distributed.any_of(problem is not None):  # nobody may wait for one that could not read
            return None, problem or "is damaged"
        saved = np.asarray(distributed.fetch(found.pop("crc32")))
        if (wrong := _checksums(found) != saved).any():
            return None, f"is damaged (its array {list(_shapes(found))[int(wrong.argmax())]})"
        return found, None


def _checksums(tree: Any) -> np.ndarray:
    """CRC-32 of each array of a tree [leaves], in the order of its names."""
    leaves = jax.tree.leaves(distributed.fetch(tree))
    raw = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
    return np.array([zlib.crc32(raw(x)) for x in leaves], np.uint32)


def _other(saved: dict, wanted: dict) -> str | None:
    """Why arrays of these names, shapes and dtypes are not those that are wanted; None if they are."""
    if not saved:
        return "is damaged (it lists no arrays)"
    names = [k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k)]
    if not names:
        return None
    return f"is another run's (its array {min(names)})"


@contextlib.contextmanager
def _silent_threads() -> Iterator[None]:
    """Keeps threads of Orbax and TensorStore from printing what the main thread raises anyway."""
    hooks = threading.excepthook, sys.excepthook
    threading.excepthook = lambda args: None
    sys.excepthook = lambda *args: None
    try:
        yield
    except Exception:
        time.sleep(0.5)  # for the last of them
        raise
    finally:
        threading.excepthook, sys.excepthook = hooks


def _shapes(tree: Any) -> dict[str, tuple]:
    """Names of leaves, however their containers are kept, and their shapes and dtypes."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name(path): (tuple(x.shape), str(np.dtype(x.dtype))) for path, x in leaves}
