"""Errors that a user can cause and mend."""

import difflib


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
