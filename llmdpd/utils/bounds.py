"""Bounds beside fields: `lr: Annotated[float, Bounds(0)]`, walked by `check_config`."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from llmdpd.errors import InputError, located

MOST = sys.float_info.max
"""The highest bound: any finite number."""


@dataclass(frozen=True)
class Bounds:
    """The lowest and the highest value that a number may have, both allowed."""

    low: float
    high: float = MOST

    def __str__(self) -> str:
        return f"{self.low} to {self.high}" if self.high < MOST else f"a finite number, at least {self.low}"

    def check(self, value: float | None, field: str, path: str | Path | None = None) -> None:
        """Raise `InputError` for a number that is NaN or outside the bounds; None passes."""
        # A number of numpy as Python's: its own float32 can't hold the highest bound.
        number = value.item() if isinstance(value, np.generic) else value
        if number is not None and not self.low <= number <= self.high:
            raise InputError("the number is out of range", path=path, field=field, found=value, expected=self)


Count = Annotated[int, Bounds(1)]
WholeNumber = Annotated[int, Bounds(0)]
NonNegative = Annotated[float, Bounds(0)]
Fraction = Annotated[float, Bounds(0, 1)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]
# A network of more than this a layer is a slip of the pen, and would end as an allocation that fails.
Width = Annotated[int, Bounds(1, 16_384)]
Layers = Annotated[int, Bounds(1, 128)]
Steps = Annotated[int, Bounds(1, 1000)]
# Episodes are listed, and workers started, before the first one ends: more than this would only fill the memory.
Episodes = Annotated[int, Bounds(1, 100_000)]
OptionalEpisodes = Annotated[int | None, Bounds(1, 100_000)]
Workers = Annotated[int | None, Bounds(1, 1024)]

ACTION_NUMBERS = Bounds(1, 65_536)
"""Numbers that a noise network denoises at once: what the samplers are tested up to."""


@cache
def bounds_of(kind: type[Any]) -> dict[str, Bounds]:
    """The bounds of a dataclass's own fields, by name."""
    extras = {
        name: getattr(hint, "__metadata__", ()) for name, hint in get_type_hints(kind, include_extras=True).items()
    }
    return {name: extra for name, found in extras.items() for extra in found if isinstance(extra, Bounds)}


@cache
def choices_of(kind: type[Any]) -> dict[str, tuple[str, ...]]:
    """The values of a dataclass's fields that are `Literal`, by name."""
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}


_PLAIN: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool, np.bool_)),
    int: ("a whole number", (Integral,)),
    float: ("a number", (Real,)),
    str: ("a string", (str, os.PathLike)),  # many name a file
    NoneType: ("none", (NoneType,)),
}


@cache
def plain_types_of(kind: type[Any]) -> dict[str, tuple[Any, ...]]:
    """The types of a dataclass's fields that hold numbers, strings, booleans or None alone, by name."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(each in _PLAIN for each in types):
            found[name] = types
    return found


def _check_type(value: Any, types: tuple[Any, ...], field: str, path: str | Path | None) -> None:
    """Raise `InputError` for a value of another type; a boolean is no number."""
    fits = any(isinstance(value, _PLAIN[each][1]) for each in types)
    if not fits or (isinstance(value, bool) and bool not in types):
        expected = " or ".join(_PLAIN[each][0] for each in types)
        raise InputError("the value is of another type", path=path, field=field, found=repr(value), expected=expected)


def check_config(config: Any, prefix: str = "", path: str | Path | None = None) -> None:
    """Hold a configuration, and every one within it, to its fields' types, bounds and choices, and to its `check()`.

    Args:
        config: a dataclass; a `check()` method raises `InputError` for fields that do not fit each other.
        prefix: dotted name of the configuration, put before the fields' names. path: the file that it came from.

    Raises:
        InputError: naming the first field that is wrong.
    """
    dot = f"{prefix}." if prefix else ""
    bounds, types = bounds_of(type(config)), plain_types_of(type(config))  # type: ignore[arg-type]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in bounds and isinstance(value, Real):
            bounds[field.name].check(value, f"{dot}{field.name}", path)  # type: ignore[arg-type]
        if field.name in types:
            _check_type(value, types[field.name], f"{dot}{field.name}", path)
        choices = choices_of(type(config)).get(field.name)  # type: ignore[arg-type]
        if choices and value not in choices:
            expected = " or ".join(choices)
            name = f"{dot}{field.name}"
            raise InputError(f"unknown {field.name}", path=path, field=name, found=value, expected=expected)
        if dataclasses.is_dataclass(value):
            check_config(value, f"{dot}{field.name}", path)
    if hasattr(config, "check"):
        with located(path=path, field=prefix or None):
            config.check()


class SharedByHeads:
    """What configurations have in common whose `width` is shared out among attention `heads`."""

    width: int
    heads: int

    def check(self) -> None:
        """Raise `InputError` for a width that the heads cannot share evenly."""
        if self.width % self.heads:
            problem, expected = "the width cannot be shared out among the heads", f"a divisor of {self.width} (width)"
            raise InputError(problem, field="heads", found=self.heads, expected=expected)
