"""Errors that a user can cause and put right, and how a command ends."""

import argparse
import atexit
import difflib
import errno
import gc
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from rlrr_jax import screen

TRACEBACK = "RLRR_JAX_TRACEBACK"  # set to 1, it shows where a one-sentence error came from


class UserError(ValueError):
    """Wrong input. Its text is one sentence: what is wrong and what to do. Commands show only that."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def nearest(name: str, known: Iterable[str]) -> str:
    """`"did you mean 'rlrr'? Known"` for a misspelt name, `"known"` if nothing is near."""
    near = difflib.get_close_matches(str(name), list(map(str, known)), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? Known" if near else "known"


def unknown(kind: str, name: str, options: Iterable[str]) -> UserError:
    """A UserError for a name that is none of `options`, with the nearest of them."""
    options = sorted(map(str, options))
    hint = nearest(name, options)
    return UserError(f"unknown {kind} {str(name)!r}: {hint}: {', '.join(options) or 'none'}")


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are UserErrors: a misspelt flag is named with the nearest."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; an unknown flag is reported before what is missing for want of it."""
        flags = list(self._option_string_actions)
        for text in sys.argv[1:] if args is None else args:
            flag = text.partition("=")[0]
            if flag.startswith("--") and not any(known.startswith(flag) for known in flags):
                raise unknown("flag", flag, [known for known in flags if known.startswith("--")])
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f"{message}: {self.prog} --help lists what there is")


def one_sentence(program: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a command. What its user can put right ends it with one sentence and exit code 1.

    Every other exception is a fault of this program, or of a change to it, and keeps its traceback.

    Args:
      program: what the command does.
      interrupted: what is printed after Ctrl-C.
    """
    screen.prepare()
    # What imports and traces make stays: Python would look through it for garbage every 700 objects, a
    # tenth of a short run's time, and once more as it ends.
    gc.set_threshold(5_000)
    atexit.register(gc.freeze)
    try:
        program()
    except UserError as e:
        _end(f"error: {e}")
    except OSError as e:
        if e.errno is None:
            _report()
        where = f" {e.filename}" if e.filename else ""
        reason = (e.strerror or str(e)).strip().splitlines()[-1].strip()
        way = "check the path, its permissions and the space"
        if e.errno == errno.EMFILE:
            way = "raise the limit of open files (ulimit -n)"
        _end(f"error: cannot use{where} ({reason}): {way}")
    except KeyboardInterrupt:
        leave(interrupted, 130)
    except Exception as e:
        if memory := out_of_memory(e):
            _end(f"error: {memory}")
        _report()


def out_of_memory(error: BaseException) -> str | None:
    """One sentence for JAX's error of a device whose memory does not suffice; None for others."""
    text = str(error)
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return None
    if not re.search(r"[Oo]ut of memory|[Ff]ailed to allocate", text) or re.search(
        r"vmem|[Ss]hared", text
    ):
        return None
    size = re.search(r"allocat\w+ ([\d.]+ ?\w*)", text)
    wanted = f" of {size[1].strip()}" if size else ""
    return (
        f"the memory of the device does not suffice for an array{wanted}: lower the batch size "
        f"(config.batch_size and config.eval_batch_size, or --batch_size), or take a smaller model"
    )


def leave(text: str, code: int) -> NoReturn:
    """Says a text and ends this process at once.

    What may be compiling in other threads would crash while Python ends in its own way.
    """
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)  # the code is decided
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    print(text, file=sys.stderr)
    sys.stdout.flush()
    os._exit(code)


def _end(text, code=1):
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    sys.unraisablehook = sys.excepthook = lambda *_: None  # what libraries could not clean up
    print(text, file=sys.stderr)
    sys.exit(code)


def _report():
    traceback.print_exc()
    print(
        "\nThis is no error of your input that we know of: if you changed the code, look there; else "
        "please report the lines above, with your command, where you got rlrr_jax from.",
        file=sys.stderr,
    )
    sys.exit(1)
