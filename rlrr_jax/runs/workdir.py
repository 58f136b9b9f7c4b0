"""The folders of a workdir: `<workdir>/<task>/<method>/<run>`, whose they are, and who may write."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlrr_jax import checks, files
from rlrr_jax.data import sources
from rlrr_jax.errors import UserError
from rlrr_jax.runs import identity
from rlrr_jax.runtime import distributed

LIST = "parts.json"  # of the runs that parts of a start have to do


class Work(NamedTuple):
    """A run, its folder, where its images are read, and how it is called on the screen."""

    run: Any
    folder: Any
    found: sources.Found | None
    label: str

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return (self.folder / "result.json").exists()


def task_folder(run: Mapping) -> str:
    """Name of the folder of a task: its name, of a path `stripes:TASK` with a dot."""
    return run["task"].replace(":", ".")


def method_folder(run: Mapping) -> str:
    """Name of the folder above, or of a method with its options: `"rlrr"`, `"rlrr-rank2"`."""
    return run["method"].replace(":", ".") + (f"-{run['options']}" if run.get("options") else "")


def write_list(folder: Any, runs: list) -> None:
    """Writes which runs are to come, so that `report` knows of those that nobody begins."""
    known = {str(path.relative_to(folder)) for path in read_list(folder)}
    every = known | {str(run.relative_to(folder)) for run in runs}
    if every != known:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / LIST, {"runs": sorted(every)})


def read_list(folder: Any) -> list:
    """The folders of the runs that `write_list` wrote; none where the list is missing or damaged."""
    try:
        known = [str(name) for name in files.read_json(folder / LIST)["runs"]]
    except (OSError, UserError, KeyError, TypeError):  # each start writes it again
        return []
    return [folder / name for name in known if re.fullmatch(r"(?:(?!\.)[^/]+/){2}(?!\.)[^/]+", name)]


def run_folder(run: Mapping) -> str:
    """Name of the folder of a run, or of a row: `"seed0"`, `"seed0-lr0.01"`."""
    return f"seed{run['seed']}" + (f"-{run['trial']}" if run.get("trial") else "")


def provenance(work: Work, sha256: str) -> dict[str, str]:
    """What besides its configuration decides a run's result: weights and dataset."""
    assert work.found
    return {"backbone_sha256": sha256, "dataset": work.found.dataset}


def finished_source(run: Any, folder: Any) -> sources.Found | None:
    """Where the images of a finished run came from, which is filled in; None if it is not finished."""
    if not (folder / "result.json").exists() or not (folder / "config.json").exists():
        return None
    saved = files.read_json(folder / "config.json")
    for key in ("source", "variant"):
        if run.data[key] is None or run.data[key] == saved["data"][key]:
            run.data[key] = saved["data"][key]
    return sources.Found(saved["data"]["source"], None, saved["dataset"])


@contextlib.contextmanager
def locked(works: Iterable[Work]) -> Iterator[None]:
    """Holds the folders of runs for this process."""
    with contextlib.ExitStack() as stack:
        for work in works if distributed.is_process_zero() else ():
            if work.finished:  # nothing is written there, and it may be read-only
                continue
            work.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.lock(work.folder))
        distributed.wait("locked")
        yield


def check_folder(work: Work, sha256: str) -> None:
    """UserError if another run is in a folder, or this one with weights of another digest."""
    path = work.folder / "config.json"
    if not path.exists():
        return
    old, new = (
        identity.identity(ConfigDict(c))
        for c in (files.read_json(path), {**work.run.to_dict(), **provenance(work, sha256)})
    )
    if work.run.protocol == "vtab" and "val_acc" not in work.run:  # it has not chosen yet
        for values in (old, new):
            for key in (*checks.GRID, "val_acc", "loss_kwargs"):
                values.pop(key, None)
    if changed := identity.differences(old, new):
        raise UserError(
            f"{work.folder} holds a run with {', '.join(changed)}: choose another --workdir, or "
            f"delete that folder"
        )


def keep_heads(works: Iterable[Work]) -> None:
    """Gives runs that were begun the size of head that their checkpoints have, see `heads.share`."""
    for work in works:
        if not (path := work.folder / "config.json").exists():
            continue
        saved = files.read_json(path).get("head_classes")
        if saved is not None:
            work.run.head_classes = saved
        elif "head_classes" in work.run:
            del work.run["head_classes"]
