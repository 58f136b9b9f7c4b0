"""How a run is asked to stop."""

import contextlib
from collections.abc import Iterator
from typing import Any


class Stopped(BaseException):
    """The run was asked to stop, and everything done so far is saved.

    Like KeyboardInterrupt it is no Exception, so that nothing which expects errors catches it.
    """


class Stop:
    """Remembers that the run was asked to stop.

    Inside `training` the train loop looks at it after each dispatch and saves before it raises
    `Stopped`. Outside nothing is unsaved, so `ask` raises `Stopped` itself.
    """

    def __init__(self) -> None:
        self.asked, self._training = False, False

    def __call__(self) -> bool:
        return self.asked

    def ask(self, *_: Any) -> None:
        """Asks the run to stop; the handler of a signal."""
        self.asked = True
        if not self._training:
            raise Stopped

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """A context in which the train loop looks whether it should stop."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
