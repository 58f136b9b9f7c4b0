"""The kind of device that programs are made for: this process's, or one that is not there."""

import contextlib
from collections.abc import Iterator

import jax

_FOR: list[str] = []


def platform() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`."""
    return _FOR[-1] if _FOR else jax.default_backend()


@contextlib.contextmanager
def compiling_for(kind: str) -> Iterator[None]:
    """Makes programs for devices of a kind, which need not be there: forms and defaults are theirs."""
    _FOR.append(kind)
    try:
        yield
    finally:
        _FOR.pop()
