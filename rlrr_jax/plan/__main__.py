"""Compiles what a configuration would run, for devices that are not there, and says what it needs.

python -m rlrr_jax.plan --config configs/vtab.py:all --topology v5e:4x4
"""

import os
import sys

if __name__ == "__main__":  # before JAX: nothing is run, and nobody's device is taken
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", "")

import collections
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from rlrr_jax import main as main_lib
from rlrr_jax.errors import UserError, one_sentence

_TOPOLOGY = flags.DEFINE_string("topology", None, "devices, such as v5e:4x4, h100:1 or cpu:8")
_OUT = flags.DEFINE_string("out", None, "folder for plan.md and plan.json")
HELP = """\
Compiles what a configuration would run, for devices that are not there, and says what it needs.

  python -m rlrr_jax.plan --config configs/vtab.py:all --topology v5e:4x4
  python -m rlrr_jax.plan --config configs/vtab.py:cifar,method=full --topology h100:1 --out plan

  --topology KIND:SHAPE  v4, v5e, v5p, v6e (pip install 'jax[tpu]'), h100:N (jax[cuda13]), cpu:N
  --out DIR              where plan.md and plan.json go

Weights and images are not read. Seconds are a bound, the roofline's: bytes moved at full bandwidth or
matmuls at full speed, whichever takes longer. A real run takes longer.
"""


def main(argv: list[str]) -> None:
    """Prints the tables."""
    from rlrr_jax.plan import page, topology

    if argv[1:]:
        raise UserError(f"{argv[1]!r} belongs to no flag: see --help")
    config = main_lib.CONFIG.value
    if config is None or _TOPOLOGY.value is None:
        missing = "--config configs/vtab.py" if config is None else f"--topology {topology.NAMED}"
        raise UserError(f"a configuration and a topology are needed: add {missing}")
    with topology.compiling_for(_TOPOLOGY.value) as devices:
        done = plan(config, devices)
    text = page.text(devices, done)
    print(text)
    if _OUT.value:
        page.write(pathlib.Path(_OUT.value), text, devices, done)


def plan(config: ConfigDict, devices: Any) -> list:
    """A `page.Group` for each group of runs that trains together; what is alike is compiled once."""
    from rlrr_jax import config as config_lib
    from rlrr_jax import heads
    from rlrr_jax.plan import measure, page

    runs = config_lib.resolve(config)
    heads.share(runs)
    cache = measure.Cache(devices.chip, functools.partial(print, flush=True))
    done, todo = [], collections.deque(groups(runs))
    while todo:
        group = todo.popleft()
        found = page.of(group, devices.devices, cache)
        if isinstance(found, list):  # smaller groups
            todo.extendleft(reversed(found))
        else:
            done.append(found)
    return done


def groups(runs: list[ConfigDict]) -> Iterator[list[ConfigDict]]:
    """The runs that train together, in the order in which `suite.run` trains them, searches before."""
    from rlrr_jax import config as config_lib
    from rlrr_jax.checks import GRID
    from rlrr_jax.runs import identity

    for _, several in itertools.groupby(runs, identity.together):
        alike = list(several)
        for _, part in itertools.groupby(alike, lambda run: run.trial):
            first = next(part)
            if first.protocol == "vtab":
                yield config_lib.trials(first)
        for run in alike:
            if run.protocol == "vtab":  # which it chooses; no program depends on it
                run.update({key: run.grid[key][0] for key in GRID})
        yield alike


def run() -> None:
    """The command."""
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        one_sentence(lambda: print(HELP, end=""))
        return
    one_sentence(lambda: app.run(main, flags_parser=main_lib.parse_flags))


if __name__ == "__main__":
    run()
