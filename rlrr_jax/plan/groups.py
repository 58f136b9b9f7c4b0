"""Which runs train together, as a suite would train them, and the programs of each group."""

import collections
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlrr_jax import config as config_lib
from rlrr_jax import heads
from rlrr_jax import run as run_lib
from rlrr_jax.checks import GRID
from rlrr_jax.plan import measure, outline
from rlrr_jax.plan.topology import Topology
from rlrr_jax.runs import identity, parts, search
from rlrr_jax.runs.group import smaller
from rlrr_jax.runs.parts import Part
from rlrr_jax.runtime.memory import TooLarge


class Group(NamedTuple):
    """Runs that train together: how many, of what, their programs, seconds of each on all devices.

    `part` is the number of the part that trains them, see `runs.parts`; 1 where none are dealt out.
    """

    runs: int
    label: str
    where: str
    programs: dict[str, measure.Measured]
    seconds: dict[str, float]
    remat: bool
    part: int


def measured(
    config: ConfigDict, devices: Topology, say: Callable[[str], None], number: int = 1
) -> list[Group]:
    """The groups of a configuration; programs that are alike are compiled once.

    Args:
      config: the configuration.
      devices: what it is planned for, see `topology.compiling_for`.
      say: function of a line about what is being compiled.
      number: of parts to which the runs are dealt out, each on these devices.
    """
    runs = config_lib.resolve(config)
    heads.share(runs)
    cache = measure.Cache(devices.chip, say)
    dealt = {i: parts.share(runs, Part(i, number)) for i in range(1, number + 1)}
    done, todo = [], collections.deque((i, g) for i, share in dealt.items() for g in together(share))
    while todo:
        part, group = todo.popleft()
        try:
            done.append(_measured(group, devices.devices, cache)._replace(part=part))
        except TooLarge as e:
            title = f"{group[0].task} {group[0].method}"
            todo.extendleft((part, few) for few in reversed(smaller(group, group, e, title)))
    return done


def together(runs: list[ConfigDict]) -> Iterator[list[ConfigDict]]:
    """The runs that train together, in the order in which `suite.run` trains them, searches before."""
    for _, several in itertools.groupby(runs, identity.together):
        alike = list(several)
        for _, part in itertools.groupby(alike, lambda run: run.trial):
            first = next(part)
            if first.protocol == "vtab":
                folds = itertools.groupby(search.settings(first), lambda run: run.get("fold"))
                yield from (list(fold) for _, fold in folds)
        for run in alike:
            if run.protocol == "vtab":  # which it chooses; no program depends on it
                run.update({key: run.grid[key][0] for key in GRID})
        yield alike


def _measured(runs: list[ConfigDict], devices: list[Any], cache: measure.Cache) -> Group:
    """A group; memory.TooLarge where its trials do not fit together."""
    each = [run_lib.of(run) for run in runs]
    built, first = outline.of(each, devices), outline.first(each, devices)
    programs = {"train": cache.train(built)}
    if first:
        programs["first blocks"] = cache.first(built, *first[:2])
    if any(built.runs[0].evaluated):
        programs |= {"evaluate": cache.evaluate(built), "merge": cache.merge(built)}
    seconds = dict(measure.seconds(built, programs, first[2] if first else 0))
    remat, label = bool(runs[0].model.remat), built.runs[0].label
    return Group(len(runs), label, measure.words(built), programs, seconds, remat, 1)
