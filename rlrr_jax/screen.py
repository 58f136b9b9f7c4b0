"""Standard output and error as a long run needs them: nothing that happens to them ends it."""

import codecs
import os
import sys
import warnings

_PLAIN = {"±": "+-", "°": " deg", "…": "..."}


class Tolerant:
    """A text stream that goes on into nothing when its reader has gone (`| head -1`)."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """As a stream's; the number of characters, written or not."""
        try:
            return self._stream.write(text)
        except OSError:  # the reader or the terminal has gone, or the disk of a log is full
            self._discard()
            return len(text)

    def flush(self) -> None:
        """As a stream's."""
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self):
        """Lets the stream's descriptor lead to nothing, what is buffered, too."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name):
        return getattr(self._stream, name)


def prepare() -> None:
    """Makes both streams usable: closed ones (`2>&-`), pipes that break, encodings without `±`.

    Lines come when they are printed, through pipes, too. And Python does not warn of large images:
    those that Pillow refuses are named.
    """
    warnings.filterwarnings("ignore", r"Image size .* exceeds limit")
    for descriptor in (0, 1, 2):  # a free one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error("rlrr_jax.plain", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="rlrr_jax.plain", line_buffering=True)
        setattr(sys, name, stream if isinstance(stream, Tolerant) else Tolerant(stream))


def _plain(error):
    """What is written for characters that an encoding lacks."""
    text = error.object[error.start : error.end]
    plain = (_PLAIN.get(c, "?" if ord(c) < 0xD800 else f"\\u{ord(c):04x}") for c in text)
    return "".join(plain), error.end
