"""What values that files say of a backbone may be; ValueError for any other."""

from typing import Any


def check(gelu: str, mean: Any, std: Any) -> None:
    """ValueError unless these can be a GELU, and three means and standard deviations."""
    if gelu not in ("tanh", "exact", "quick"):
        raise ValueError(f"unknown GELU {gelu!r}")
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9
    for what, values in {"mean": mean, "std": std}.items():
        good = isinstance(values, list | tuple) and len(values) == 3 and all(map(number, values))
        if not good or (what == "std" and min(values) <= 0):
            raise ValueError(f"{what} {values!r} is not three numbers")


def whole(value: Any, what: str) -> int:
    """A number of heads."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1000:
        raise ValueError(f"{what} {value!r} is no number of heads")
    return value


def epsilon(value: Any) -> float:
    """A small number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f"epsilon {value!r} is no small number above 0")
    return float(value)


def size(value: Any) -> Any:
    """A side, or (height, width) where they differ; None for none. ValueError for what is no size."""
    sides = list(value) if isinstance(value, list | tuple) else [value]
    if value is None or not sides:
        return None
    whole = all(isinstance(x, int) and not isinstance(x, bool) and 0 < x <= 1 << 14 for x in sides)
    if not whole or len(sides) > 2:
        raise ValueError(f"image size {value!r} is no size in pixels")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)
