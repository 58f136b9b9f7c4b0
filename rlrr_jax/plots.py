"""Matplotlib figures as PNG bytes, drawn with our own settings whatever the user's are."""

import io
import os
import sys

from rlrr_jax import files
from rlrr_jax.errors import first_line

# The colours of Okabe and Ito, which colour-blind people tell apart, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKS = "osD^vPX*"


def settings():
    """A context with Matplotlib's own defaults, whatever a matplotlibrc or MPLBACKEND says."""
    backend = os.environ.pop("MPLBACKEND", None)  # one that is not installed ends the import
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg"})


def subplots(rows=1, columns=1, size=(6.4, 4.8), **options):
    """A figure of its own canvas, not pyplot's, and its axes [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure, dpi=120):
    """A figure as PNG bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format="png")
    return picture.getvalue()


def save(path, draw, *args):
    """Writes the picture that `draw(*args)` returns, if any; one that fails costs no result.

    Returns whether it was written; if not, a warning is printed.
    """
    try:
        with settings():
            picture = draw(*args)
        if picture:
            files.write(path, picture)
        return bool(picture)
    except Exception as e:  # whatever a drawing library can raise
        print(f"warning: {path} was not drawn ({first_line(e)})", file=sys.stderr, flush=True)
        return False
