"""The transitions of a running collection, on disk: pieces that are written once, so that saving costs what is new.

    FOLDER/steps-000000000-000000300.npz     arrays by name, of the steps from the first number to before the second
    FOLDER/steps-000000300-000000450.npz

The checkpoint that was written after them says which of them count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.content import read_npz
from llmdpd.errors import InputError
from llmdpd.utils.files import atomic_writer

_PROBLEM = "a piece of the recorded steps is "
_PIECE = re.compile(r"steps-(\d{9,})-(\d{9,})\.npz")


class ReplayLog:
    """The pieces in a folder, each of which begins where the one before it ends.

    Attributes:
        steps: up to which step they reach.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps = 0

    def append(self, arrays: Mapping[str, NDArray[np.float32]], end: int) -> None:
        """Write the steps from `self.steps` to before `end`, arrays [end - steps, …] by name; nothing if none."""
        if end == self.steps:
            return
        with atomic_writer(self._piece(self.steps, end)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        self.steps = end

    def take_up(self, steps: int) -> dict[str, NDArray[np.float32]]:
        """The first `steps` steps, arrays by name (none of 0 steps); `append` continues after them.

        Later pieces were written by a process that was killed before its checkpoint; they are removed. Raises
        InputError for a piece that is missing or broken.
        """
        found: dict[tuple[int, int], Path] = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = _PIECE.fullmatch(path.name)
            if match is not None and int(match[2]) <= steps:
                found[int(match[1]), int(match[2])] = path
            elif match is not None or (path.name.startswith(".steps-") and path.name.endswith(".tmp")):
                path.unlink()
        self.steps = 0
        parts = []
        for (start, end), path in sorted(found.items()):
            if start != self.steps:
                break
            parts.append(_read(path, end - start))
            _check_alike(path, parts[0], parts[-1])
            self.steps = end
        if self.steps != steps:
            have, expected = f"steps up to {self.steps}", f"steps up to {steps}"
            raise InputError(_PROBLEM + "missing", path=self.folder, found=have, expected=expected)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _piece(self, start: int, end: int) -> Path:
        return self.folder / f"steps-{start:09d}-{end:09d}.npz"


def _read(path: Path, count: int) -> dict[str, NDArray[np.float32]]:
    try:
        arrays = read_npz(path)
    except InputError as error:
        raise InputError(_PROBLEM + "damaged", path=path, found=error.found) from None
    for name, array in arrays.items():
        if array.shape[:1] != (count,):
            found, expected = list(array.shape), f"[{count}, …]"
            raise InputError(_PROBLEM + "damaged", path=path, field=name, found=found, expected=expected)
    return arrays


def _check_alike(path: Path, first: dict[str, NDArray[np.float32]], other: dict[str, NDArray[np.float32]]) -> None:
    sizes, expected = ({name: array.shape[1:] for name, array in part.items()} for part in (other, first))
    if sizes != expected:
        raise InputError(_PROBLEM + "damaged", path=path, field="sizes of a step", found=sizes, expected=expected)
