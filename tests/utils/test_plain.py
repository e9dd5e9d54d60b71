from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from llmdpd.errors import InputError
from llmdpd.utils.plain import Named, differences, from_plain, to_plain


@dataclasses.dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] = ("a",)
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int = 1
    flag: bool = False
    kind: Literal["x", "y"] = "x"
    maybe: int | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int
    depth: int | None


def test_values_that_are_no_defaults_come_back() -> None:
    value = Outer(7, True, "y", 3, Inner(("p", "q"), 2.0))
    assert from_plain(Outer, json.loads(json.dumps(to_plain(value))), "f") == value


def test_paths_become_strings() -> None:
    assert to_plain({"a": 1}) == {"a": 1}
    assert to_plain((Path("a/b"), [1])) == ["a/b", [1]]


def test_missing_fields_take_their_defaults() -> None:
    assert from_plain(Outer, {"inner": {"rate": 1}}, "f") == Outer(inner=Inner(rate=1.0))
    assert type(from_plain(Outer, {"inner": {"rate": 1}}, "f").inner.rate) is float


@dataclasses.dataclass(frozen=True)
class Shape(Named):
    """One of two kinds, by name."""

    @classmethod
    def by_name(cls, name: str) -> type[Named]:
        if name not in ("box", "ball"):
            raise InputError("unknown shape", found=name)
        return Box if name == "box" else Ball


@dataclasses.dataclass(frozen=True)
class Box(Shape):
    name = "box"
    edge: float = 1.0


@dataclasses.dataclass(frozen=True)
class Ball(Shape):
    name = "ball"
    inner: Inner = dataclasses.field(default_factory=Inner)


@dataclasses.dataclass(frozen=True)
class Scene:
    shape: Shape = dataclasses.field(default_factory=Box)


@pytest.mark.parametrize("value", [Scene(), Scene(Box(2.0)), Scene(Ball(Inner(("p",), 0.1)))])
def test_one_of_several_kinds_comes_back_by_its_name(value: Scene) -> None:
    plain = to_plain(value)
    assert plain["shape"]["name"] == value.shape.name
    assert from_plain(Scene, json.loads(json.dumps(plain)), "f") == value


@pytest.mark.parametrize(
    ("kind", "plain", "field", "message"),
    [
        *[(Outer, {"count": bad}, "count", "expected: int") for bad in ("1", 1.0, True, None)],
        (Outer, {"flag": 1}, "flag", "expected: bool"),
        (Outer, {"kind": "z"}, "kind", "expected: 'x', 'y'"),
        (Outer, {"maybe": "3"}, "maybe", "expected: int"),
        *[(Outer, {"inner": {"rate": bad}}, "inner.rate", "expected: a number") for bad in ("fast", True)],
        (Outer, {"inner": {"names": "a"}}, "inner.names", "expected: tuple"),
        (Outer, {"inner": {"names": ["a", 3]}}, "inner.names", "found:    3"),
        (Outer, {"cuont": 1}, "cuont", "unknown field.*nearest names: count"),
        (Outer, {"inner": {"rat": 1}}, "inner.rat", "unknown field.*nearest names: rate"),
        (Outer, [1], None, "expected: an object"),
        *[(Outer, {"inner": bad}, "inner.", "expected: an object") for bad in (3, None)],
        (Sizes, {"width": 2}, "depth", "a field is missing"),
        (Scene, {"shape": {"name": "cone"}}, "shape.name", "unknown shape"),
        (Scene, {"shape": {"edge": 1.0}}, "shape.name", "unknown shape"),
        (Scene, {"shape": {"name": "ball", "edge": 1.0}}, "shape.edge", "unknown field"),
    ],
)
def test_what_is_wrong_is_named(kind: type[Any], plain: Any, field: str | None, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}") as error:
        from_plain(kind, plain, "some/policy.json")
    assert (error.value.path, error.value.field) == ("some/policy.json", field)


def test_a_field_without_default_is_given() -> None:
    assert from_plain(Sizes, {"width": 2, "depth": None}, "f") == Sizes(2, None)


def test_differences_name_every_leaf() -> None:
    old = to_plain(Outer())
    assert differences(old, to_plain(Outer())) == []
    new = to_plain(Outer(count=2, inner=Inner(("b",), 0.25)))
    assert differences(old, new) == ["count: 1 → 2", "inner.names: ['a'] → ['b']", "inner.rate: 0.5 → 0.25"]
    del new["flag"]
    assert "flag: False → None" in differences(old, new)
    assert differences({"a": {"b": 1}}, {"a": 3}) == ["a: {'b': 1} → 3"]
