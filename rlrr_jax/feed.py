"""Training images on their way to the devices: all at once, or in shards, the next one in flight."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlrr_jax import evaluate
from rlrr_jax.data.crops import Crops

SHARE = 1 / 3  # of a device's memory that training images may take
SHARD_BYTES = 2**29  # at most, so that the host, too, has few at once, and the first is soon there


class Feed(NamedTuple):
    """The training images of a run, and how they come to the devices.

    What fits lies there whole, and each epoch takes it in its own order. What does not is read in
    that order, some steps at a time, while the steps before train. Random crops are made anew for
    each epoch.

    Attributes:
      images: images [N, h, w, 3] uint8 that take indices, in memory or a file, or `crops.Crops`; or
        what first blocks made of them, see `prefix`.
      labels: classes [N] int32, or what tasks of other kinds have for them, see `metrics`.
      batch_size: number of images in a step.
      shard: number of steps whose images are on the devices at once; None is all of an epoch.
      order_key: key of the order of images, which `step.train_steps` has, too.
    """

    images: Any
    labels: np.ndarray
    batch_size: int
    shard: int | None
    order_key: jax.Array

    @property
    def renewed(self) -> bool:
        """Whether images come anew while others train, so that there are two sets of them."""
        return self.shard is not None or isinstance(self.images, Crops)

    @property
    def slots(self) -> int:
        """Number of images on the devices at once."""
        return len(self.labels) if self.shard is None else self.shard * self.batch_size

    def shapes(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of what `read` returns, once it is on a mesh."""
        everywhere = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
        out = {
            "images": everywhere((self.slots, *self.images.shape[1:]), self.images.dtype),
            "labels": everywhere((self.slots, *self.labels.shape[1:]), self.labels.dtype),
        }
        if self.shard is None:
            return out
        numbers = everywhere((self.slots,), jnp.int32)
        return {**out, "numbers": numbers, "first": everywhere((), jnp.int32)}

    def read(self, epoch: int, start: int, which: Any, cancelled: Any = None) -> dict[str, Any]:
        """The data of `step.train_steps`, on the host, for the steps of an epoch from `start` on.

        Args:
          epoch: number of the epoch.
          start: first step.
          which: indices of the images, or a slice, see `parts`.
          cancelled: a `threading.Event` that ends the making of crops.
        """
        if isinstance(self.images, Crops):
            images = self.images.take(epoch, np.arange(len(self.labels))[which], cancelled)
        else:
            images = self.images[which]
        data = {"images": images, "labels": self.labels[which]}
        if self.shard is None:
            return data
        data["numbers"] = which.astype(np.int32)
        padded = {name: evaluate.pad(array, self.slots) for name, array in data.items()}
        return {**padded, "first": np.int32(start * self.batch_size)}

    def parts(self, epoch: int, step: int, steps: int) -> Iterator[tuple[int, int, Any]]:
        """Parts of an epoch: the first step, the step after the last, and the indices of the images.

        Args:
          epoch: number of the epoch.
          step: the step to go on from, in the first part.
          steps: number of steps of the epoch.
        """
        if self.shard is None:
            yield 0, steps, slice(None)
            return
        key = jax.random.fold_in(self.order_key, epoch)  # as in `step.train_steps`
        order = np.asarray(jax.random.permutation(key, len(self.labels)))
        for start in range(min(step, steps - 1) // self.shard * self.shard, steps, self.shard):
            first = start * self.batch_size
            yield start, min(start + self.shard, steps), order[first : first + self.slots]


def steps_at_once(images: Any, batch_size: int, budget: float) -> int | None:
    """Number of steps in a shard, of which two must fit, or None if all images fit.

    Args:
      images: an array [N, h, w, 3] or `crops.Crops`.
      batch_size: number of images in a step.
      budget: bytes of a device for training images.
    """
    each = int(np.prod(images.shape[1:])) * np.dtype(images.dtype).itemsize
    copies = 2 if isinstance(images, Crops) else 1
    if copies * len(images) * each <= budget:
        return None
    return max(1, int(min(budget / 2, SHARD_BYTES) // (batch_size * each)))


@contextlib.contextmanager
def ahead(load: Callable, todo: Iterable) -> Iterator[Iterator]:
    """An iterator over `load(item, cancelled)`, each made in a thread while the one before is used.

    Args:
      load: function of an item and of a `threading.Event`, which is set when nobody waits any more.
      todo: items.
    """
    cancelled = threading.Event()  # of this iterator: others may use the same images
    with ThreadPoolExecutor(1) as pool:

        def each() -> Iterator:
            waiting = None
            for item in todo:
                ready, waiting = waiting, pool.submit(load, item, cancelled)
                if ready:
                    yield ready.result()
            if waiting:
                yield waiting.result()

        try:
            yield each()
        finally:
            cancelled.set()
