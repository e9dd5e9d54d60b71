"""Ctrl-C and SIGTERM: finish the iteration, save, exit."""

from __future__ import annotations

import signal
from types import FrameType

from llmdpd.errors import StopRequestedError


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM is noted; a second one acts as without it."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: int | None = None

    def check(self) -> None:
        """Raise `StopRequestedError` if a stop was asked for."""
        if self._received is not None:
            raise StopRequestedError(self._received)

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
