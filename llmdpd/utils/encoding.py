"""Output that never fails: on terminals that cannot show everything, into closed pipes and onto full disks."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import select
import sys
from typing import Any

_PLAIN = {"–": "-", "—": "-", "…": "...", "±": "+-", "→": "->", "×": "x", "·": "-", "≤": "<=", "≥": ">="}
_NAME = "llmdpd.plain"


def accept_any_output() -> None:
    """From now on, nothing that is written to stdout or stderr raises an error.

    What their encoding lacks is written in ASCII. Once the system refuses what is written (a full disk, a reader that
    is gone), the rest is left out: what a command makes matters more than what it says of it. A line on stderr says so,
    unless it was the reader that left.
    """
    codecs.register_error(_NAME, _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _unfailing(stream, name))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_NAME)


class _Unfailing(io.FileIO):
    """A file whose writes succeed, the first that is refused and all later ones by being left out."""

    said_of: str
    refused = False

    def write(self, data: Any) -> int:
        if self.refused:
            return len(data)
        try:
            while (written := super().write(data)) is None:  # a pipe that does not block, and is full
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            self.refused = True
            if error.errno != errno.EPIPE and self.said_of != "stderr":
                print(f"{self.said_of}: {error.strerror}; what would be printed is left out", file=sys.stderr)
            return len(data)


def _unfailing(stream: io.TextIOWrapper, name: str) -> io.TextIOWrapper:
    """The same output, through `_Unfailing`."""
    with contextlib.suppress(OSError):
        stream.flush()
    raw = _Unfailing(stream.fileno(), "w", closefd=False)  # `sys` keeps the stream itself
    raw.said_of = name
    by_line = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, _NAME, line_buffering=by_line)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Punctuation as its plain form, anything else as a backslash sequence."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end
