"""Files that are whole or as they were, on disk or behind gs://; locks; where caches are."""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import pathlib
import secrets
import stat
import sys
from collections.abc import Iterator
from typing import Any

from etils import epath

from rlrr_jax.errors import UserError

LONGEST = 4000  # characters of a path
CACHE = "RLRR_JAX_CACHE"  # names the folder of caches
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_told = set()  # that there are no locks


def local(path: Any) -> pathlib.Path:
    """A path on this machine, `~` expanded; UserError for gs:// and the like, or an unknown user."""
    if "://" in str(path):
        raise UserError(f"{path} is not on this machine: copy it into a local folder first")
    if "\0" in str(path) or len(str(path)) > LONGEST:
        raise UserError(f"{str(path)[:80]!r} is no path: check it")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as e:  # of ~nobody, or of nobody's
        raise UserError(f"{path} names no home directory: write the whole path") from e


def cache(folder: Any = None) -> pathlib.Path:
    """Folder of caches: the one given, else $RLRR_JAX_CACHE, else ~/.cache/rlrr_jax.

    Raises UserError if this user has no home directory and no other folder is set.
    """
    folder = folder or os.environ.get(CACHE)
    if folder:
        return local(folder)
    try:
        return pathlib.Path("~/.cache/rlrr_jax").expanduser()
    except RuntimeError as e:
        raise UserError(
            f"this user has no home directory: set {CACHE} to a folder for downloads and decoded images"
        ) from e


def walk(folder: Any) -> Iterator[pathlib.Path]:
    """All files below a local folder, linked folders followed once each, in order of their paths.

    Raises UserError for a folder that is not there, or must not be read.
    """

    def refuse(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"there is no folder {error.filename}: check the path")
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): change its permissions"
        ) from error

    seen = set()
    for root, names, found in os.walk(folder, onerror=refuse, followlinks=True):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in seen:  # a link to where we have been
            names.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        names.sort()
        yield from (pathlib.Path(root, name) for name in sorted(found))


def below(folder: Any, *patterns: str) -> list:
    """Paths whose parts below a folder match patterns; the folder's own name is no pattern.

    Args:
      folder: a folder, here or behind gs://.
      patterns: of the names at each depth, such as "*", "seed*", "result.json"; hidden names are taken.
    """
    found = [epath.Path(folder)]
    for pattern in patterns:
        inner: list = []
        for here in found:
            with contextlib.suppress(PermissionError):  # such as lost+found
                inner += here.iterdir() if here.is_dir() else ()
        found = [path for path in inner if fnmatch.fnmatchcase(path.name, pattern)]
    return sorted(found)


def write(path: Any, data: str | bytes) -> None:
    """Replaces a file by text or bytes; it is on the disk when this returns.

    A link stays, and what it leads to is replaced; pipes and devices are written to.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_special(path):
        with open(path, "wb") as f:
            f.write(data)
        return
    path = through(path)
    writable(path)
    part = temporary(path)
    try:
        with part.open("wb") as f:
            f.write(data)
            if "://" not in str(part):
                f.flush()
                os.fsync(f.fileno())
        part.replace(path)
    except BaseException as e:
        part.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno is not None and (e.filename in (None, str(part))):
            raise OSError(e.errno, e.strerror, str(path)) from e  # a full disk names no file
        raise


def writable(path: Any) -> None:
    """UserError if a path cannot be a file: it is a folder, or the one that it lies in is not there."""
    if "://" in str(path):
        return
    path = through(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for {path.name}: make it, or name another")


def through(path: Any) -> Any:
    """Where a file is written: what a link leads to."""
    return epath.Path(path if "://" in str(path) else os.path.realpath(path))


def is_special(path: Any) -> bool:
    """Whether a path is a pipe, a device or a socket, which cannot be replaced."""
    if "://" in str(path):
        return False
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def temporary(path: Any) -> Any:
    """A name beside a path that no other writer has."""
    path = epath.Path(path)
    return path.parent / f".{secrets.token_hex(6)}.part{path.suffix[:20]}"


def write_json(path: Any, value: Any) -> None:
    """Replaces a file by indented JSON."""
    write(path, json.dumps(value, indent=2) + "\n")


def write_rows(path: Any, rows: list) -> None:
    """Replaces a `.jsonl` file."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Any) -> dict:
    """The JSON object in a file; UserError if it is none."""
    with _explained(path):
        value = json.loads(epath.Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value


def read_rows(path: Any) -> list:
    """The lines of a `.jsonl` file, [] if there is none; UserError if one is no JSON."""
    path = epath.Path(path)
    with _explained(path):
        return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


@contextlib.contextmanager
def _explained(path):
    try:
        yield
    except ValueError as e:
        raise UserError(
            f"{path} is damaged ({e}): delete {epath.Path(path).parent} to start this run again"
        ) from e


class Held(UserError):
    """A folder that another process holds."""


@contextlib.contextmanager
def lock(folder: Any, name: str = ".lock", wait: bool = False) -> Iterator[bool]:
    """Holds a local folder for one process; if another has it, waits or raises UserError.

    Yields whether it is held: behind gs:// it is not, nor, with a warning, where locks are unknown.
    """
    if "://" in str(folder):
        yield False
        return
    with open(epath.Path(folder) / name, "w") as f:
        held = True
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise Held(
                f"another process is training in {folder}: wait for it, or choose another --workdir"
            ) from e
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            held = False
            if not _told:
                print(
                    f"warning: {folder} cannot be locked ({e.strerror}): start no second process there",
                    file=sys.stderr,
                )
            _told.add(str(folder))
        yield held


def sha256(path: Any) -> str:
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
