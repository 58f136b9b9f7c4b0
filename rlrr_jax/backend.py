"""The devices that programs are made for: this process's, or ones that are not there."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Absent(NamedTuple):
    """Devices that are not there: their platform, number, and bytes of each, where that is known."""

    platform: str
    number: int = 1
    memory: int | None = None


_FOR: list[Absent] = []


def absent() -> Absent | None:
    """The devices that are not there, where programs are made for such."""
    return _FOR[-1] if _FOR else None


def platform() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`."""
    return _FOR[-1].platform if _FOR else jax.default_backend()


def number() -> int:
    """Number of devices."""
    return _FOR[-1].number if _FOR else jax.device_count()


@contextlib.contextmanager
def compiling_for(kind: str, number: int = 1, memory: int | None = None) -> Iterator[None]:
    """Makes programs for devices which need not be there: forms, defaults and what fits are theirs.

    Args:
      kind: their platform.
      number: how many.
      memory: bytes of each; None is as much as this process's have.
    """
    _FOR.append(Absent(kind, number, memory))
    try:
        yield
    finally:
        _FOR.pop()
