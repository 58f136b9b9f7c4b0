"""Time and training speed of a group of trials, over all its starts."""

import time
from collections.abc import Sequence

DISPATCH_SECONDS = 10  # a dispatch should last no longer, so that progress and Ctrl-C come through


class Clock:
    """Time spent on a group of trials over all its starts, and their training speed.

    Attributes:
      images: number of images trained so far, by all trials together.
      seconds: time of training alone, without evaluation and compilation.
    """

    def __init__(self, begun: float | None = None) -> None:
        """Args: begun: when its work was begun, by `time.perf_counter`; None: now."""
        self.begun = time.perf_counter() if begun is None else begun
        self.images, self.seconds = 0.0, 0.0

    def elapsed(self) -> float:
        """Seconds since training first began, without the time between two starts."""
        return time.perf_counter() - self.begun

    def add(self, images: int, seconds: float) -> None:
        """Counts a dispatch."""
        self.images, self.seconds = self.images + images, self.seconds + seconds

    def steps(self, images: int) -> int:
        """Number of steps that take `DISPATCH_SECONDS`; 1 as long as the speed is not known.

        Args:
          images: number of images in a step, over all trials.
        """
        if not self.seconds:
            return 1
        return max(1, int(DISPATCH_SECONDS * self.images / self.seconds / images))

    def numbers(self, epoch: int, step: int) -> list[float]:
        """How far the run is, as a checkpoint keeps it."""
        return [epoch, step, self.elapsed(), self.images, self.seconds]

    def resume(self, numbers: Sequence[float]) -> tuple[int, int]:
        """Counts on where a checkpoint stopped; returns its epoch and step."""
        epoch, step, elapsed, self.images, self.seconds = map(float, numbers)
        self.begun -= elapsed
        return int(epoch), int(step)
