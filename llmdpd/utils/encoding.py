"""Output on terminals and in logs whose encoding cannot show everything that is written."""

from __future__ import annotations

import codecs
import sys

_PLAIN = {"–": "-", "—": "-", "…": "...", "±": "+-", "→": "->", "×": "x", "·": "-", "≤": "<=", "≥": ">="}
_NAME = "llmdpd.plain"


def accept_any_output() -> None:
    """From now on, what the encoding of stdout or stderr lacks is written in ASCII, where it would raise an error."""
    codecs.register_error(_NAME, _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_NAME)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Punctuation as its plain form, anything else as a backslash sequence."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end
