"""Runs dealt out: each process takes a share of them on its own devices, and needs no other.

Runs of a task and method stay together, since they train together, or choose from one search. What each
costs is known from the configuration alone, so that every process deals alike, before any work, without
a word between them: the dearest first, each to the part that has least.
"""

import math
import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlrr_jax import config as config_lib
from rlrr_jax import methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.runs import forecast, search, workdir
from rlrr_jax.runtime import distributed

TRIAL = 0.8  # what a run of a search costs of one: 800 images of 1,000


class Part(NamedTuple):
    """One of so many shares, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"part {self.number}/{self.of}"


def chosen(text: str, config: ConfigDict) -> Part | None:
    """The part of this process; None if it trains all runs, alone or together with others.

    To be called before anything asks for a device: a part's process sees its own devices alone.

    Args:
      text: `"3/8"`; `"off"`; or `"auto"`, which deals out where several processes are announced and
        there are as many tasks and methods for them.
      config: the configuration.

    Raises UserError for any other text.
    """
    if text == "off":
        return None
    announced = distributed.announced()
    if text != "auto":
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(
                f"--part={text} is no part: write a number and how many, such as 3/8, or off"
            )
        part = Part(int(found[1]), int(found[2]))
    elif announced and 1 < announced.number <= config_lib.groups(config):
        part = Part(announced.mine + 1, announced.number)
    else:
        return None
    if announced and announced.number > 1:
        distributed.stay_apart(announced)
    return part


def share(runs: list[ConfigDict], part: Part) -> list[ConfigDict]:
    """The runs of a part, in their order."""
    costs: dict[tuple, float] = {}
    searched = set()
    for run in runs:
        unit, setting = _unit(run), (*_unit(run), run.get("trial"))
        number = 1.0
        if run.protocol == "vtab" and setting not in searched:  # seeds share a search
            searched.add(setting)
            number += TRIAL * math.prod(map(len, search.grid(run).values())) * max(run.grid.folds, 1)
        costs[unit] = costs.get(unit, 0) + number * passes(run)
    loads, mine = [0.0] * part.of, set()
    for unit in sorted(costs, key=lambda unit: -costs[unit]):
        least = loads.index(min(loads))
        loads[least] += costs[unit]
        mine |= {unit} if least == part.number - 1 else set()
    return [run for run in runs if _unit(run) in mine]


def _unit(run: Any) -> tuple[str, str]:
    return workdir.task_folder(run), workdir.method_folder(run)


def passes(run: ConfigDict) -> float:
    """What a run costs, in training images of a network that is trained whole, see `forecast.Cost`.

    What a method leaves alone is computed once, see `prefix`.
    """
    whole = forecast.cost(run)
    untouched = methods.get(run.method, **run.method_kwargs.to_dict()).untouched
    if untouched is None:
        return whole.passes
    depth = models.sizes(run.model.variant).get("depth") or 1
    alone = min(untouched(depth) / depth, 1)
    once = (whole.images / run.epochs + whole.evaluated / max(whole.evaluations, 1)) / 3
    return whole.passes * (1 - alone) + once * alone
