"""How much fits on a device."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax import backend


class TooLarge(Exception):
    """The trials do not fit into the memory of the devices together.

    Attributes:
      fits: how many of them should fit; 0 if not even one does without `config.model.remat`.
      why: what is printed where several do not.
    """

    def __init__(self, fits: int, why: str | None = None) -> None:
        self.fits, self.why = fits, why or f"{fits} fit into memory at once"
        super().__init__(self.why)


def limit() -> int:
    """Bytes that a program may use on a device: what an accelerator reports, 0.7 of a CPU's memory."""
    absent = backend.absent()
    if absent and absent.memory:
        return absent.memory
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return int(0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def size(tree: Any) -> int:
    """Bytes of all leaves of a tree, of a device's share where it is divided."""
    here = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
    return sum(math.prod(here(x)) * _width(x.dtype) for x in jax.tree.leaves(tree))


def _width(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def machine(devices: int) -> dict[str, Any]:
    """What decides the order of sums, and so the last bits: devices and, for CPUs, cores."""
    device = jax.devices()[0]
    cores = _cores() if device.platform == "cpu" else None
    return {"devices": devices, "kind": device.device_kind, "cores": cores}


def _cores() -> int | None:
    """Number of cores that this process may use."""
    known = hasattr(os, "sched_getaffinity")  # on Linux
    return len(os.sched_getaffinity(0)) if known else os.cpu_count()


def words(machine: dict[str, Any]) -> str:
    """A `machine` as it is printed: `"1 x cpu (2 cores)"`."""
    cores = f" ({machine['cores']} cores)" if machine.get("cores") else ""
    return f"{machine.get('devices')} x {machine.get('kind')}{cores}"
