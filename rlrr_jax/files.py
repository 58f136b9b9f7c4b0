"""Small files that are whole or as they were, on disk or behind gs://."""

import contextlib
import fcntl
import json
import os
import pathlib

from etils import epath

from rlrr_jax.errors import UserError


def local(path):
    """A path on this machine, `~` expanded; UserError for gs:// and the like, or an unknown user."""
    if "://" in str(path):
        raise UserError(f"{path} is not on this machine: copy it into a local folder first")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as e:  # of ~nobody
        raise UserError(f"{path} names no home directory: write the whole path") from e


def write(path, data):
    """Replaces a file by text or bytes; it is on the disk when this returns."""
    path = epath.Path(path)
    part = path.parent / (path.name + ".part")
    with part.open("wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        if "://" not in str(part):
            f.flush()
            os.fsync(f.fileno())
    part.replace(path)


def write_json(path, value):
    """Replaces a file by indented JSON."""
    write(path, json.dumps(value, indent=2) + "\n")


def write_rows(path, rows):
    """Replaces a `.jsonl` file."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path):
    """The JSON object in a file; UserError if it is none."""
    with _explained(path):
        value = json.loads(epath.Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value


def read_rows(path):
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


@contextlib.contextmanager
def lock(folder, name=".lock", wait=False):
    """Holds a local folder for one process; if another has it, waits or raises UserError."""
    if "://" in str(folder):
        yield
        return
    with open(epath.Path(folder) / name, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise UserError(
                f"another process is training in {folder}: wait for it, or choose another --workdir"
            ) from e
        yield
