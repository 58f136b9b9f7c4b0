"""Errors that a user can cause and mend."""

import argparse
import difflib
import sys


class UserError(ValueError):
    """Wrong input. Its text is one sentence: what is wrong and what to do. `main` shows only that."""


def first_line(error):
    """The first line of an exception's text, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def unknown(kind, name, options):
    """A UserError for a name that is none of `options`, with the nearest of them."""
    options = sorted(map(str, options))
    near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? Known" if near else "known"
    return UserError(f"unknown {kind} {str(name)!r}: {hint}: {', '.join(options)}")


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are UserErrors: a misspelt flag is named with the nearest."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        """As argparse's; an unknown flag is said before what is missing for want of it."""
        flags = list(self._option_string_actions)
        for text in sys.argv[1:] if args is None else args:
            flag = text.partition("=")[0]
            if flag.startswith("--") and not any(known.startswith(flag) for known in flags):
                raise unknown("flag", flag, [known for known in flags if known.startswith("--")])
        return super().parse_args(args, namespace)

    def error(self, message):
        """Called by argparse."""
        raise UserError(f"{message}: {self.prog} --help lists what there is")


def one_sentence(program):
    """Runs a program; every error a user can mend ends it with one sentence and exit code 1."""
    try:
        program()
    except UserError as e:
        sys.unraisablehook = sys.excepthook = lambda *_: None  # what libraries could not clean up
        sys.exit(f"error: {e}")
    except OSError as e:
        where = f" {e.filename}" if e.filename else ""
        reason = (e.strerror or str(e)).strip().splitlines()[-1].strip()
        sys.exit(f"error: cannot use{where} ({reason}): check the path, its permissions and the space")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on where it stopped")
