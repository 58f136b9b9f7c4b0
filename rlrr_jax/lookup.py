"""What a name stands for: a short one of a table, or a path `module:object` to anybody's code.

Ours are in `NAMES`; the folders of `projects`, where there are any, bring their own. A path is
imported as Python finds it, from the working directory too: `method=mygain:method` is `method` of
`mygain.py`. Only what a user typed is imported (see `allow`), never what a card or a row names.
"""

import hashlib
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from rlrr_jax.errors import UserError, unknown

_METHODS = (
    *("rlrr", "linear", "full", "bitfit", "norm", "last", "ssf", "lora", "dora", "vera", "fact"),
    *("arc", "repadapter", "apla", "hta", "glora", "difffit", "oft", "pissa", "hira", "knn"),
)
# Kind -> short name -> path:
#   method     a function `(**options) -> methods.Method`
#   loss       one like `losses.cross_entropy`, or a `losses.Loss`
#   gradients  a function `key -> optax transformation`
#   block      a class like `models.vit.Block`
#   model      a class of flax modules, see `models.build`
#   task       a `data.task.Task`; tasks: names of several
#   table      a function `rows -> Markdown or ""` of a report
#   weights    a function `frozen -> warning or ""`, for every file of weights that is read
NAMES: dict[str, dict[str, str]] = {
    "method": {name: f"rlrr_jax.methods.{name}:method" for name in _METHODS},
    "loss": {
        name: f"rlrr_jax.losses:{name}" for name in ("cross_entropy", "binary", "squared", "huber")
    },
}
VALUES = ("task", "tasks")  # all others are called
PROJECTS = "rlrr_jax.projects"
_ALLOWED: set[str] = set()


class NotAllowed(UserError):
    """A path that no user typed is to be imported."""


def names(kind: str) -> dict[str, str]:
    """The short names of a kind, and their paths: ours, then those of projects."""
    there = importlib.util.find_spec(PROJECTS) is not None
    theirs = importlib.import_module(PROJECTS).NAMES.get(kind, {}) if there else {}
    return {**NAMES.get(kind, {}), **theirs}


def is_path(name: Any) -> bool:
    """Whether a name is a path `module:object`."""
    return isinstance(name, str) and ":" in name


def find(kind: str, name: str) -> Any:
    """What a name of a kind stands for.

    Raises UserError, with the nearest name or with what was tried, if there is none, or nothing that
    can be called, and `NotAllowed` for a path that no user typed. An error inside the code of a path is
    raised as it is.
    """
    known = names(kind)
    if not is_path(name) and name not in known:
        raise unknown(kind, name, known)
    if is_path(name) and name not in _ALLOWED:
        raise NotAllowed(
            f"the {kind} {name} is somebody's code: read it, and add --import {name} to let it run"
        )
    found = _imported(kind, known.get(name, name))
    if kind not in VALUES and not callable(found):
        raise UserError(f"the {kind} {name} is {type(found).__name__}: name a function or a class")
    return found


def _imported(kind: str, path: str) -> Any:
    name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*name.split("."), attribute)):
        raise UserError(f"the {kind} {path!r} is no path: write module:object, such as mygain:method")
    here = os.getcwd()
    try:
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)
        module = importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name and not name.startswith(f"{e.name}."):
            raise  # of an import inside
        raise UserError(
            f"there is no module {name!r} for the {kind} {path!r}: it is neither in {here} nor "
            f"installed"
        ) from e
    if not hasattr(module, attribute):
        known = [x for x in vars(module) if not x.startswith("_")]
        raise unknown(f"object of {name} for the {kind}", attribute, known)
    return getattr(module, attribute)


def code(chosen: Iterable[Any]) -> tuple[str, ...]:
    """`("mygain:method 1a2b3c4d",)`: the paths among names, with digests of the files they are in."""
    paths = sorted({name for name in chosen if is_path(name)})
    return tuple(f"{path} {_digest(path.partition(':')[0])}" for path in paths)


def _digest(name: str) -> str:
    file = getattr(importlib.import_module(name), "__file__", None)
    data = pathlib.Path(file).read_bytes() if file else b""
    return hashlib.sha256(data).hexdigest()[:8]


def is_allowed(name: str) -> bool:
    """Whether a user typed a name, see `allow`."""
    return name in _ALLOWED


def allow(*typed: Any) -> None:
    """Lets `find` import the paths among these names, and images be fetched from their address.

    A user typed them; no card or list ever does.
    """
    _ALLOWED.update(name for name in typed if is_path(name))
