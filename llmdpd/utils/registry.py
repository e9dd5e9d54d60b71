"""Registries: methods, task suites, file formats and text models by name, this package's own and other packages'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from llmdpd.errors import InputError, nearest_names

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to objects, each of which is imported when it is first looked up.

    It contains this package's own entries, those that installed packages declare as entry points of `group`, and those
    that were added by `register`.

    Args:
        kind: what an entry is, in messages, as "method".
        group: the entry-point group, as "llmdpd.methods".
        own: this package's own entries, name → "module:attribute".

    Attributes:
        version: changes with every entry that is added or removed, for what is remembered of them.

    Raises:
        InputError: the name is unknown; the nearest names are offered.
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, str]) -> None:
        self.kind, self.group = kind, group
        self._own = {name: EntryPoint(name, place, group) for name, place in own.items()}
        self._loaded: dict[str, T] = {}
        self.version = 0

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        """Entry points, this package's own first; those win over another package's of the same name."""
        return self._own | {p.name: p for p in entry_points(group=self.group) if p.name not in self._own}

    def register(self, name: str, value: T) -> None:
        """Add an entry, or replace one."""
        self._loaded[name] = value
        self.version += 1

    def remove(self, name: str) -> None:
        """Remove an entry that `register` added, if it is there."""
        self._loaded.pop(name, None)
        self.version += 1

    def __getitem__(self, name: str) -> T:
        if name not in self._loaded:
            if name not in self._points:
                raise self.unknown(name)
            self._loaded[name] = self._points[name].load()
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._loaded or name in self._points

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._points, *self._loaded)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def unknown(self, name: str, field: str | None = None) -> InputError:
        """The error for an unknown name; `field` is by default the kind of entry."""
        return InputError(
            f"unknown {self.kind}",
            field=self.kind if field is None else field or None,
            found=name,
            expected=", ".join(self),
            hint=f"nearest names: {nearest_names(name, list(self))}",
        )
