"""Configurations (nested frozen dataclasses) to plain JSON values and back, strictly."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from llmdpd.errors import InputError, located, nearest_names

T = TypeVar("T")


class Named:
    """A dataclass that stands for several kinds, of which `name` in its plain form says which one it is."""

    name: ClassVar[str]

    @classmethod
    def by_name(cls, name: str) -> type[Named]:
        """The dataclass of this name.

        Raises:
            InputError: there is none.
        """
        raise NotImplementedError


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, paths to strings, numpy's numbers to Python's."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = {"name": value.name} if isinstance(value, Named) else {}
        return name | {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type[T], value: Any, path: Path | str, field: str = "") -> T:
    """A dataclass from what `to_plain` made; fields that are missing take their defaults.

    A dataclass whose fields had other names says so in a class attribute, `former`: former name → name.

    Raises:
        InputError: an unknown field, a missing one that has no default, or a value of another type; names the file
            and the field.
    """
    if not isinstance(value, dict):
        raise InputError("wrong configuration", path=path, field=field or None, found=value, expected="an object")
    if issubclass(kind, Named):
        value = dict(value)
        with located(path, f"{field}name"):
            kind = kind.by_name(str(value.pop("name", None)))  # type: ignore[assignment]
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    needed = [f.name for f in dataclasses.fields(kind) if _has_no_default(f)]  # type: ignore[arg-type]
    former: Mapping[str, str] = getattr(kind, "former", {})
    value = {former.get(name, name) if former.get(name) not in value else name: item for name, item in value.items()}
    for name in value:
        if name not in names:
            hint = f"nearest names: {nearest_names(name, names)}"
            raise InputError("unknown field in the configuration", path=path, field=f"{field}{name}", hint=hint)
    for name in needed:
        if name not in value:
            raise InputError("a field is missing", path=path, field=f"{field}{name}", expected=str(hints[name]))
    return kind(**{name: _convert(hints[name], item, path, f"{field}{name}") for name, item in value.items()})


def former_names(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted names that fields of nested dataclasses had, and those that they have now."""
    olds = {now: old for old, now in getattr(config, "former", {}).items()}
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value, now, old = getattr(config, field.name), f"{prefix}{field.name}", olds.get(field.name)
        inner = [""]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= former_names(value, f"{now}.")
            inner = [f".{name}" for name in _leaf_names(value)]
        if old is not None:
            found |= {f"{prefix}{old}{rest}": f"{now}{rest}" for rest in inner}
    return found


def _leaf_names(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from (f"{field.name}.{name}" for name in _leaf_names(value))
        else:
            yield field.name


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, path: Path | str, field: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, path, f"{field}.")  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(value) in arguments:
            return value
        return _convert(next(a for a in arguments if a is not type(None)), value, path, field)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, path, field) for item in value)
    if origin is Literal:
        good, expected = value in arguments, ", ".join(map(repr, arguments))
    elif hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good, expected = number and (isinstance(value, float) or abs(value) <= sys.float_info.max), "a number"
    else:
        good, expected = type(value) is hint, getattr(hint, "__name__", str(hint))
    if not good:
        problem = "wrong value in the configuration"
        raise InputError(problem, path=path, field=field, found=repr(value), expected=expected)
    return float(value) if hint is float else value


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`field: old → new` for every leaf in which two plain configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix[:-1]}: {old!r} → {new!r}"]
