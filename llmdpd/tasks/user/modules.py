"""Modules beside a task file: imported from its own folder, under their own names, as long as the file is in use."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from llmdpd.errors import InputError


@dataclass
class _Folder:
    """A folder whose modules are imported: what was there before, to be put back."""

    path: Path
    known: frozenset[str] = field(default_factory=lambda: frozenset(sys.modules))
    replaced: dict[str, ModuleType] = field(default_factory=dict)


_entered: _Folder | None = None


def import_from(folder: Path, name: str, where: str) -> ModuleType:
    """The module called `name`, which is the folder's own where it has one, whatever else has that name.

    The folder comes first on `sys.path`, for modules that are imported later, until `leave_folder` or another folder.

    Raises:
        InputError: naming the field `where`: there is no such module, or importing it fails.
    """
    entered, top = _enter(folder), name.partition(".")[0]
    if _has(folder, name) and not _lies_in(sys.modules.get(top), folder):
        for other in _tree({top}):
            entered.replaced[other] = sys.modules.pop(other)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            expected = f"a module that is installed, or lies in {folder}"
            raise InputError("no such module", field=where, found=name, expected=expected) from None
        raise _fails(error, name, where) from error
    except (Exception, SystemExit) as error:
        raise _fails(error, name, where) from error


def leave_folder() -> None:
    """Forget the modules of the folder that was last imported from; what stood in their place is put back."""
    global _entered
    if _entered is None:
        return
    new = {name for name in sys.modules if name not in _entered.known or name in _entered.replaced}
    own = {name for name in new if _lies_in(sys.modules[name], _entered.path)}
    for name in _tree(own):
        if name in new:
            del sys.modules[name]
    sys.modules.update(_entered.replaced)
    if str(_entered.path) in sys.path:
        sys.path.remove(str(_entered.path))
    _entered = None


def in_words(error: BaseException) -> str:
    """An error of a user's code in a line: its kind, what it says, and where it was raised."""
    said = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {said[0] if said else ''}{place}"


def _fails(error: BaseException, name: str, where: str) -> InputError:
    return InputError("the environment's module fails", field=where, found=name, hint=in_words(error))


def _enter(folder: Path) -> _Folder:
    global _entered
    if _entered is None or _entered.path != folder:
        leave_folder()
        _entered = _Folder(folder)
        sys.path.insert(0, str(folder))
    return _entered


def _tree(tops: set[str]) -> list[str]:
    """Names of the modules that are loaded of these top-level ones."""
    return [name for name in sys.modules if name.partition(".")[0] in tops]


def _has(folder: Path, name: str) -> bool:
    place = folder.joinpath(*name.split("."))
    return place.with_name(f"{place.name}.py").is_file() or (place / "__init__.py").is_file()


def _lies_in(module: ModuleType | None, folder: Path) -> bool:
    """Whether a top-level module is one of the folder's own: a file of it, or a package in it."""
    if module is None:
        return False
    file = getattr(module, "__file__", None)
    places = [os.path.dirname(file)] if file else list(getattr(module, "__path__", ()))
    if file and os.path.basename(file) == "__init__.py":
        places = [os.path.dirname(places[0])]
    elif not file:
        places = [os.path.dirname(place) for place in places]
    return os.path.realpath(folder) in map(os.path.realpath, places)
