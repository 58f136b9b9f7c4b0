"""Curves for TensorBoard or Weights & Biases, under the names that `metrics.jsonl` has."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rlrr_jax.errors import UserError, first_line
from rlrr_jax.results.outputs import Outputs
from rlrr_jax.runtime import distributed

Write = Callable[[list[dict]], None]


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(kind: str | None) -> None:
    """UserError if the package that a kind of log needs is not installed, or cannot be imported."""
    if kind is None:
        return
    try:
        importlib.import_module(PACKAGES[kind])
    except ImportError as e:
        raise UserError(
            f"config.log={kind} needs {PACKAGES[kind]}: pip install {PACKAGES[kind]}"
        ) from e


@contextlib.contextmanager
def open_logs(kind: str | None, job: Any, outputs: Outputs, epoch: int) -> Iterator[Write]:
    """A function that takes the row of an epoch of each trial.

    Args:
      kind: "tensorboard" (event files in `<run>/tensorboard`), "wandb" (a run for each trial, which
        goes on when the trial does; `WANDB_PROJECT` and `WANDB_MODE` hold), or None.
      job: the `job.Job`.
      outputs: where the files of the trials are.
      epoch: the first epoch that is logged; later ones of an interrupted start are replaced.
    """
    if kind is None or not distributed.is_process_zero():
        yield lambda rows: None
        return
    writers = _OPEN[kind](job, outputs, epoch)

    def log(rows: list[dict]) -> None:
        for (write, _), row in zip(writers, rows):
            write(row)

    try:
        yield log
    finally:
        for _, close in writers:
            close()


def _tensorboard(job, outputs, epoch):
    from tensorboardX import SummaryWriter

    def one(folder):
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)

        def write(row):
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["epoch"])
            writer.flush()

        return write, writer.close

    return [one(folder) for folder in outputs.folders]


def _wandb(job, outputs, epoch):
    import wandb

    from rlrr_jax.runs import identity

    def one(run, folder, label):
        plain = {**run.to_dict(), **outputs.provenance}
        try:
            started = wandb.init(
                id=identity.fingerprint([run], outputs.provenance),
                name=label,
                config=plain,
                dir=str(folder),
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(init_timeout=30),
            )
        except Exception as e:  # without a key, a network, rights: the run matters more
            print(
                f"warning: {label} has no curves in wandb ({first_line(e)}): set WANDB_MODE=offline to "
                f"keep them here",
                file=sys.stderr,
            )
            return lambda row: None, lambda: None
        return lambda row: started.log(_numbers(row), step=row["epoch"]), started.finish

    configs = [run.config for run in job.runs]
    return [one(*each) for each in zip(configs, outputs.folders, outputs.labels)]


def _numbers(row):
    return {name: x for name, x in row.items() if name != "epoch" and x is not None}


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb}
