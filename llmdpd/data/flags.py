"""Flags of recorded steps: where episodes end, which ends are terminals, and which step succeeded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmdpd.data.assemble import check_rows
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading
from llmdpd.tasks.specs import find_suite

Flags = NDArray[np.bool_]

TERMINALS = ("terminals", "terminations", "dones")
"""Names of the flag that marks ends; `dones` and a `terminals` that stands alone may be time limits."""
TIMEOUTS = ("timeouts", "truncations")
"""Names of the flag that marks time limits alone."""
MASKS = "masks"
"""OGBench's name: 0 where the task truly ended, beside `terminals` at the end of every trajectory."""
SUCCESS = ("success", "successes", "is_success")
"""Customary names of the flag that says whether a step succeeds, in the infos or beside the other fields."""

_OLD_FILES_HINT = "D4RL's first files (-v0) have no timeouts: take the -v2 file of the same name"
_log = logging.getLogger(__name__)


class Ends(NamedTuple):
    """What flags say of N rows."""

    last: Flags  # [N], the last row of an episode
    terminals: Flags  # [N], of these, true terminals


def as_flags(values: ArrayLike, field: str, path: str | Path | None) -> Flags:
    """Flags [N] or [N, 1] of any type of number as booleans [N]. Raises InputError for other values than 0 and 1."""
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "fiub" or array.ndim != 1:
        found = f"{array.dtype} {list(array.shape)}"
        raise InputError("wrong flags", path=path, field=field, found=found, expected="0 or 1 for each step")
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError("wrong flags", path=path, field=field, found=f"{array[row]} at row {row}", expected="0 or 1")
    return array != 0


def terminates(task: str, reading: Reading) -> bool | None:
    """Whether episodes of a task, by the name that the data give it, can end by themselves; None: nobody knows."""
    if reading.terminates is not None:
        return reading.terminates
    suite = find_suite(task)
    return None if suite is None else suite.reading(task).terminates


def episode_ends(
    fields: Mapping[str, Any], rows: int, ends_itself: bool | None, path: str | Path, label: str = ""
) -> Ends:
    """Where episodes end by the flags among `fields` [N]; the last row ends what is still running.

    With `timeouts` beside them, terminals are terminals; with OGBench's `masks`, those whose mask is 0 are. Terminals
    alone are terminals only of a task that ends by itself (`ends_itself`), and only where they part no rows: where a
    time limit parted others would not be known.

    Args:
        fields: the fields that are there, by name.
        rows: N.
        ends_itself: see `terminates`.
        path: of the file, for messages; `label` follows a field's name in them.

    Raises:
        InputError: no such flags, two names of one that disagree, another number than N, other values than 0 and 1,
            flags whose meaning is not known.
    """

    def flag(name: str) -> Flags:
        values = as_flags(fields[name], name + label, path)
        check_rows({name: values}, rows, path, label)
        return values

    name = next((name for name in TERMINALS if name in fields), None)
    if name is None:
        found = ", ".join(sorted(map(str, fields))) or "no field at all"
        raise InputError("a field is missing", path=path, field="terminals" + label, found=found)
    for one, other in (TERMINALS[:2], TIMEOUTS):
        if one in fields and other in fields and (flag(one) != flag(other)).any():
            row = int(np.argmax(flag(one) != flag(other)))
            found, expected = f"{one} {int(flag(one)[row])}, {other} {int(flag(other)[row])} at row {row}", "the same"
            raise InputError(
                "two names of one flag disagree", path=path, field=other + label, found=found, expected=expected
            )
    marked = flag(name)
    limits = next((name for name in TIMEOUTS if name in fields), None)
    if limits is not None:
        terminals, last = marked, marked | flag(limits)
    elif MASKS in fields:
        terminals = ~flag(MASKS)
        last = marked | terminals
        if (terminals & ~marked).any():
            count = int((terminals & ~marked).sum())
            _log.warning("%s: %d steps inside trajectories have a mask of 0; each ends an episode", path, count)
    elif ends_itself is False or not marked.any():
        terminals, last = np.zeros_like(marked), marked
    elif ends_itself and not marked[:-1].any():
        terminals = last = marked
    else:
        raise _unclear(name, fields, ends_itself, path, label)
    last = last.copy()
    last[-1:] = True
    return Ends(last, terminals)


def _unclear(
    name: str, fields: Mapping[str, Any], ends_itself: bool | None, path: str | Path, label: str
) -> InputError:
    what = "time limits are not marked" if ends_itself else "these may be true ends or time limits"
    return InputError(
        f"a field is missing: beside `{name}` alone {what}",
        path=path,
        field="timeouts" + label,
        found=", ".join(sorted(map(str, fields))),
        expected="timeouts (or truncations) beside terminals"
        + ("" if ends_itself else ", or a task that says whether its episodes end by themselves (terminates)"),
        hint=_OLD_FILES_HINT,
    )


def find_success(fields: Mapping[str, Any], reading: Reading) -> tuple[str, Any] | None:
    """Name and values of the success among `fields`, or among their `infos`; None where none is recorded."""
    for name in (reading.success,) if reading.success is not None else SUCCESS:
        for place in (name, f"infos/{name}"):
            found = nested(fields, place)
            if found is not None:
                return place, found
    return None


def nested(tree: Mapping[str, Any], name: str) -> Any:
    """What stands under "a" or "a/b" in nested mappings; None where nothing does."""
    value: Any = tree
    for part in [name] if name in tree else name.split("/"):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def first_success(flags: Flags) -> tuple[int, int]:
    """(success, success_step) of an episode from the flags [T] of its steps."""
    return int(flags.any()), int(np.argmax(flags)) if flags.any() else -1
