"""Flags of recorded steps: where episodes end, which ends are terminals, and which step succeeded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmdpd.data.assemble import check_rows
from llmdpd.data.notes import say_once
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading
from llmdpd.tasks.specs import find_suite, spec_by_name

Flags = NDArray[np.bool_]

DONES = "dones"
TERMINALS = ("terminals", "terminations", DONES)
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


def terminates(task: str, reading: Reading, widths: tuple[int, int]) -> bool | None:
    """Whether episodes of a task, by the name that the data give it, can end by themselves; None: nobody knows.

    A suite is asked only where the data's widths (S, A) are its task's own: files of others may have any name.
    """
    if reading.terminates is not None or not reading.by_name:
        return reading.terminates
    suite, spec = find_suite(task), spec_by_name(task)
    fits = spec is not None and (spec.state_dim, spec.action_dim) == widths
    return suite.reading(task).terminates if suite is not None and fits else None


def episode_ends(
    fields: Mapping[str, Any], rows: int, ends_itself: bool | None, path: str | Path, label: str = ""
) -> Ends:
    """Where episodes end by the flags among `fields` [N]; the last row ends what is still running.

    `terminals` are terminals beside time limits (`timeouts`), and beside `dones` that mark other ends, too; `dones`
    beside time limits mark falls, or both. With OGBench's `masks`, those whose mask is 0 are terminals. A flag alone
    marks terminals only of a task that ends by itself (`ends_itself`), and only where it parts no rows: where a time
    limit parted others would not be known.

    Args:
        fields: the fields that are there, by name.
        rows: N.
        ends_itself: see `terminates`.
        path: of the file, for messages; `label` follows a field's name in them.

    Raises:
        InputError: no such flags, two that contradict each other, another number than N, other values than 0 and 1,
            flags whose meaning is not known.
    """
    flags: dict[str, Flags] = {}
    for name in (*TERMINALS, *TIMEOUTS, MASKS):
        if name in fields:
            flags[name] = as_flags(fields[name], name + label, path)
            check_rows({name: flags[name]}, rows, path, label)
    marks = next((name for name in TERMINALS if name in flags), None)
    if marks is None:
        found = ", ".join(sorted(map(str, fields))) or "no field at all"
        raise InputError("a field is missing", path=path, field="terminals" + label, found=found)
    for one, other in (TERMINALS[:2], TIMEOUTS):
        if one in flags and other in flags:
            _agree(flags, one, other, flags[one] != flags[other], path, label)
    known = _told_apart(flags, marks, path, label)
    if MASKS in flags:
        last, terminals = _masked(flags, marks, known, path, label)
    elif known is not None:
        last, terminals = known
    elif ends_itself is False or not flags[marks].any():
        last, terminals = flags[marks], np.zeros(rows, np.bool_)
    elif ends_itself and not flags[marks][:-1].any():
        last = terminals = flags[marks]
    else:
        raise _unclear(marks, fields, ends_itself, path, label)
    last = last.copy()
    last[-1:] = True
    return Ends(last, terminals)


def _told_apart(flags: Mapping[str, Flags], marks: str, path: str | Path, label: str) -> Ends | None:
    """What two kinds of flags say together; None where there is only one kind, which may mean either.

    The last row is an end in any case, and flags may differ in whether they mark it.
    """
    marked, dones = flags[marks], flags.get(DONES)
    limits = next((name for name in TIMEOUTS if name in flags), None)
    if marks == DONES:
        if limits is None:
            return None
        both = marked & flags[limits]
        if both.any():  # `dones` are falls or time limits, so that all of these are among them
            _agree(flags, marks, limits, _before_last(flags[limits] & ~marked), path, label)
        return Ends(marked | flags[limits], marked & ~flags[limits])
    if limits is not None:
        ends = marked | flags[limits]
        if dones is not None and _before_last(dones != marked).any():  # ends of both kinds, if not those of the one
            wrong = _before_last(dones != ends)
            _agree(flags, marks, DONES, wrong & (dones | marked), path, label)
            _agree(flags, limits, DONES, wrong, path, label)
        return Ends(ends, marked)
    if dones is None:
        return None
    _agree(flags, marks, DONES, _before_last(marked & ~dones), path, label)
    return Ends(marked | dones, marked) if (marked != dones).any() else None


def _masked(flags: Mapping[str, Flags], marks: str, known: Ends | None, path: str | Path, label: str) -> Ends:
    """What OGBench's masks say: they are 0 at true ends, beside `terminals` at the ends of trajectories."""
    terminals, marked = ~flags[MASKS], flags[marks]
    if known is None:
        inside = terminals & ~marked
        if inside.any():
            words = "%s: %d steps inside trajectories have a mask of 0; each ends an episode"
            say_once(_log, words, path, int(inside.sum()))
        return Ends(marked | terminals, terminals)
    # Other flags say which ends are limits; where `terminals` are ends of any kind, those of them with a mask of 1 are.
    limits = next((flags[name] for name in TIMEOUTS if name in flags), np.zeros_like(marked))
    _agree(flags, marks, MASKS, (terminals & ~known.last) | (known.terminals & ~terminals & ~limits), path, label)
    return Ends(known.last, terminals)


def _before_last(rows: Flags) -> Flags:
    return rows & (np.arange(len(rows)) < len(rows) - 1)


def _agree(flags: Mapping[str, Flags], one: str, other: str, wrong: Flags, path: str | Path, label: str) -> None:
    """Raise `InputError`, which names both flags, where a row is `wrong`."""
    if not wrong.any():
        return
    row = int(np.argmax(wrong))
    raise InputError(
        "two flags of the ends of episodes disagree",
        path=path,
        field=other + label,
        found=f"{one} {int(flags[one][row])}, {other} {int(flags[other][row])} at row {row}",
        expected="the same, or ends of which the one flag marks a part",
        hint=f"leave out {one} or {other}, whichever does not mean what its name says",
    )


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


def success_names(reading: Reading) -> tuple[str, ...]:
    """Under which names the success is looked for, in this order; this is the one rule of all readers.

    A name that is told counts alone, unless it is one of the customary ones: an environment's `is_success` may be the
    file's `success`. Where nothing has such a name, success is unknown.
    """
    if reading.success is None:
        return SUCCESS
    others = [name for name in SUCCESS if name != reading.success] if reading.success in SUCCESS else []
    return (reading.success, *others)


def find_success(
    fields: Mapping[str, Any], reading: Reading, path: str | Path | None = None, label: str = ""
) -> tuple[str, Any] | None:
    """Name and values of the success among `fields`, or among their `infos`; None where none is recorded.

    Raises:
        InputError: customary names of which none was told, and which disagree.
    """
    names = success_names(reading)
    places = [place for name in names for place in (name, f"infos/{name}")]
    found = [(place, values) for place in places if (values := nested(fields, place)) is not None]
    if not found:
        return None
    first, values = found[0]
    told = reading.success is not None and first in places[:2]
    for other, others in [] if told else found[1:]:
        if not _same_success(values, others):
            raise InputError(
                "two names of the success disagree",
                path=path,
                field=f"{first}{label}",
                found=f"{first} and {other} differ",
                expected="the same values",
                hint="say by `success` which of them it is",
            )
    return first, values


def _same_success(values: Any, others: Any) -> bool:
    """Whether two flags say the same; what is no flag at all is refused where it is read."""
    one, other = (np.asarray(each).ravel() for each in (values, others))
    if one.dtype.kind not in "fiub" or other.dtype.kind not in "fiub":
        return True
    if one.size != other.size:  # of each step, and of the episode
        return 1 in (one.size, other.size) and bool(one.any()) == bool(other.any())
    return bool(((one != 0) == (other != 0)).all())


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
