"""What of a test runs always, and what with `-m slow`."""

import pytest


def quick(values, *chosen):
    """The cases `values` of a test: the `chosen` ones run always, the others with `-m slow`."""
    assert chosen and all(x in values for x in chosen), chosen
    return [x if x in chosen else pytest.param(x, marks=pytest.mark.slow) for x in values]
