"""The C++ of an exported policy as one source: the project's own, with every header in its place."""

from __future__ import annotations

import re
from pathlib import Path

from llmdpd.errors import InputError

HEADER = "llmdpd_policy.h"
SOURCE = "llmdpd_policy.cpp"

_TILE = ("tile/tile.cpp", "tile/layers.cpp")
"""What is compiled once for each instruction set."""
_SHARED = ("tile/tile_kernels.h", "tile/context_kernels.h", "tile/layer_kernels.h")
"""What those share with their callers."""
_INTERFACE = "export/interface.cpp"
_IN_PLACE_OF = {"thread_pool.h": "export/serial.cpp"}
_INCLUDE = re.compile(r'^#include "([^"]+)"$')
_SETS = """\
#if !defined(LLMDPD_PARTS) && !defined(LLMDPD_PART)
#define LLMDPD_ISA only
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LLMDPD_ISA_avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define LLMDPD_ISA_avx2
#else
#define LLMDPD_ISA_plain
#endif
#endif
"""


def sources() -> Path:
    """The folder of the C++ sources: an installation's, or that of the tree that this package lies in.

    Raises:
        InputError: an installation without them.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / _INTERFACE).is_file():
            return folder
    raise InputError("the C++ sources are missing", path=package / "csrc", hint="install the package anew")


def amalgamated(csrc: Path) -> str:
    """One source of all that an exported policy runs; beside it only its header and the standard library are needed."""
    expansion = _Expansion(csrc)
    tile = "".join(map(expansion.text, (*_SHARED, *_TILE)))
    # The kernels' own headers are part of an object alone; what they share with others stands before both.
    shared, own = tile[: expansion.ends[_SHARED[-1]]], tile[expansion.ends[_SHARED[-1]] :]
    runtime = expansion.text(_INTERFACE)
    while expansion.waiting:
        runtime += expansion.text(expansion.waiting.pop(0))
    title = "// An exported policy of llmdpd: generated from its sources. Build it as CMakeLists.txt says.\n"
    return (
        f"{title}{_SETS}{shared}\n#ifndef LLMDPD_PARTS\n{own}#endif  // LLMDPD_PARTS\n"
        f"\n#ifndef LLMDPD_PART\n{runtime}#endif  // LLMDPD_PART\n"
    )


class _Expansion:
    """Files with what they include in its place, each once; `waiting` are the sources of the headers met so far."""

    def __init__(self, csrc: Path) -> None:
        self._csrc = csrc
        self._done: set[Path] = set()
        self._length = 0
        self.waiting: list[str] = []
        self.ends: dict[str, int] = {}

    def text(self, name: str) -> str:
        """The file, and before each line that includes another, that one."""
        text = self._expanded((self._csrc / name).resolve())
        self._length += len(text)
        self.ends[name] = self._length
        return text

    def _expanded(self, file: Path) -> str:
        if file in self._done:
            return ""
        self._done.add(file)
        name = str(file.relative_to(self._csrc.resolve()))
        source = _IN_PLACE_OF.get(name, name.removesuffix(".h") + ".cpp")
        if file.suffix == ".h" and (self._csrc / source).is_file() and source not in (*_TILE, *self.waiting):
            self.waiting.append(source)
        lines = [f"\n// {name}\n"]
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            included = _INCLUDE.match(line.rstrip())
            if included is None:
                lines.append("" if line.startswith("#pragma once") else line)
            elif included[1] == HEADER:
                lines.append(line)
            else:
                lines.append(self._expanded(self._found(file, included[1])))
        return "".join(lines)

    def _found(self, file: Path, name: str) -> Path:
        places = (file.parent, self._csrc, self._csrc / "tile", self._csrc / "export")
        return next(place / name for place in places if (place / name).is_file()).resolve()
