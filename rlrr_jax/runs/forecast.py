"""What runs cost before they start, and how long they take once an epoch is measured."""

import functools
import math
import time
from typing import Any, NamedTuple

from rlrr_jax import methods, run_images
from rlrr_jax.runs import search, workdir
from rlrr_jax.runs.workdir import Work
from rlrr_jax.runtime.clock import Clock

TOLD_SECONDS = 600  # between two estimates on the screen


class Cost(NamedTuple):
    """Work of runs: steps, training images, evaluations, evaluated images."""

    steps: int = 0
    images: int = 0
    evaluations: int = 0
    evaluated: int = 0

    def plus(self, other: "Cost") -> "Cost":
        """The sum of two costs."""
        return Cost(*(a + b for a, b in zip(self, other)))

    @property
    def passes(self) -> float:
        """The work in units of one training image, of which evaluating one is about a third."""
        return self.images + self.evaluated / 3


def cost(run: Any, epochs: int | None = None) -> Cost:
    """The `Cost` of a run, or of its first epochs."""
    number = run_images.task_of(run).number
    if methods.get(run.method).untrained is not None:
        return Cost(0, 0, 2, sum(map(number, (*run_images.splits(run), "test"))))
    images, held_out = map(number, run_images.splits(run))
    at_end = number("test") if run_images.tested(run) and epochs in (None, run.epochs) else 0
    epochs = run.epochs if epochs is None else epochs
    times = sum(run_images.evaluates(run, epoch) for epoch in range(epochs))
    steps = epochs * math.ceil(images / run.batch_size)
    if run.total_steps and steps > run.total_steps:
        steps, images = run.total_steps, images * run.total_steps / steps
    evaluated = times * held_out + at_end
    return Cost(steps, round(epochs * images), times + (at_end > 0), evaluated)


class Forecast:
    """Prints what runs cost, and how long they take. Runs keep their number in the whole.

    Args:
      works: the runs.
      name: what comes before each line: which part of more runs these are.
    """

    def __init__(self, works: list[Work], name: str = "") -> None:
        self.name = f"{name}: " if name else ""
        self.left: dict[str, tuple[str, Cost]] = {}
        self.number: dict[str, int] = {}
        self.before: set[str] = set()
        for i, work in enumerate(works, 1):
            which = lambda w: (w.folder.parent, w.run.trial)  # seeds share a search
            seen = map(which, works[: i - 1])
            searched = work.run.protocol == "vtab" and which(work) not in seen
            for w in [*(search.trials(work) if searched else ()), work]:
                self.expect([w])
        self.told = 0.0
        self.speed: dict[str, float] = {}  # training images a second, by method
        total = functools.reduce(Cost.plus, (c for _, c in self.left.values()), Cost())
        before = len(self.before)
        print(
            f"{self.name}{len(self.left)} run(s): {total.steps:,} steps on "
            f"{total.images:,} training images, "
            f"{total.evaluations:,} evaluation(s) of {total.evaluated:,} images in all"
            + f"; {before} finished before"
            * bool(before)
        )
        if any(search.extends(work.run) for work in works if not work.finished):
            print(
                f"a search whose best lies at an end of its grid goes on beyond it, up to "
                f"{search.STEPS} times: that is not counted"
            )
        share = total.evaluated / 3 / (total.passes or 1)
        often = lambda run: run.protocol == "official" and run.get("eval_every", 1) == 1
        if share > 0.5 and any(often(work.run) for work in works):
            print(
                f"testing after every epoch is about {share:.0%} of the work: --config.eval_every=10 "
                f"tests every tenth, --config.protocol=fast the last alone"
            )

    def expect(self, works: list[Work]) -> None:
        """Counts runs among those to come that are not known yet, such as those beyond a grid."""
        for work in works:
            if work.label in self.number:
                continue
            if work.finished:
                self.before.add(work.label)
            else:
                self.left[work.label] = work.run.method, cost(work.run)
            self.number[work.label] = len(self.number) + 1

    def title(self, *works: Work) -> str:
        """`"[3/57] cifar rlrr seed 0"`, `"[4-6/57] dtd rlrr, 3 trials"`."""
        first, last = (self.number[work.label] for work in (works[0], works[-1]))
        method = workdir.method_folder(works[0].run)
        many = f"{works[0].run.task} {method}, {len(works)} trials"
        text, span = (works[0].label, first) if len(works) == 1 else (many, f"{first}-{last}")
        return f"[{span}/{len(self.number)}] {text}"

    def on_epoch(self, works: list[Work], clock: Clock, epochs: int) -> None:
        """Prints the time left, after the first epoch of each method and then every ten minutes.

        A method that has not run yet is taken to be as fast as this one.
        """
        method, now = works[0].run.method, clock.images / clock.seconds
        known, self.speed[method] = method in self.speed, now
        if known and time.monotonic() - self.told < TOLD_SECONDS:
            return
        self.told = time.monotonic()
        left = {label: c.passes for label, (_, c) in self.left.items()}
        for work in works:
            if work.label in left:  # else it finished before, and is trained again with its group
                left[work.label] -= cost(work.run, epochs).passes
        seconds = sum(left[k] / self.speed.get(m, now) for k, (m, _) in self.left.items())
        print(f"\n{self.name}about {duration(seconds)} left, {method} trains {now:,.0f} images/s")

    def finished(self, work: Work) -> None:
        """Takes a run off what is left."""
        self.left.pop(work.label, None)


def duration(seconds: float) -> str:
    """`"3 h 12 min"`, `"2 min"`, `"40 s"`."""
    minutes = round(seconds / 60)
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes > 90 else f"{minutes} min"
