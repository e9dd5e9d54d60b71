"""Lines on what is particular in data: data are read several times in a run, and each line is said once."""

from __future__ import annotations

import logging

_said: set[tuple[str, str]] = set()


def say_once(log: logging.Logger, words: str, *values: object) -> None:
    """A warning with `values` in the places of `words`, unless this process has given the same one before.

    The values should name the data's source.
    """
    line = words % values
    if (log.name, line) not in _said:
        _said.add((log.name, line))
        log.warning("%s", line)
