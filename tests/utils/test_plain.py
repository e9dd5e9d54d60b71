from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from llmdpd.config.schema import PRESETS, TrainConfig
from llmdpd.errors import InputError
from llmdpd.utils.plain import differences, from_plain, to_plain


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


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back(name: str) -> None:
    config = PRESETS[name]
    assert config.preset == name
    plain = json.loads(json.dumps(to_plain(config), allow_nan=False))
    assert from_plain(TrainConfig, plain, "run.json") == config


def test_values_that_are_no_defaults_come_back() -> None:
    value = Outer(7, True, "y", 3, Inner(("p", "q"), 2.0))
    assert from_plain(Outer, json.loads(json.dumps(to_plain(value))), "f") == value


def test_paths_become_strings() -> None:
    assert to_plain({"a": 1}) == {"a": 1}
    assert to_plain((Path("a/b"), [1])) == ["a/b", [1]]


def test_missing_fields_take_their_defaults() -> None:
    assert from_plain(Outer, {"inner": {"rate": 1}}, "f") == Outer(inner=Inner(rate=1.0))
    assert type(from_plain(Outer, {"inner": {"rate": 1}}, "f").inner.rate) is float


@pytest.mark.parametrize(
    ("plain", "field", "expected"),
    [
        ({"count": "1"}, "count", "int"),
        ({"count": 1.0}, "count", "int"),
        ({"count": True}, "count", "int"),
        ({"count": None}, "count", "int"),
        ({"flag": 1}, "flag", "bool"),
        ({"kind": "z"}, "kind", "'x', 'y'"),
        ({"maybe": "3"}, "maybe", "int"),
        ({"inner": {"rate": "fast"}}, "inner.rate", "a number"),
        ({"inner": {"rate": True}}, "inner.rate", "a number"),
        ({"inner": {"names": "a"}}, "inner.names", "tuple"),
        ({"inner": {"names": ["a", 3]}}, "inner.names", "str"),
    ],
)
def test_wrong_types_name_file_field_found_and_expected(plain: dict[str, Any], field: str, expected: str) -> None:
    with pytest.raises(InputError, match="wrong value") as error:
        from_plain(Outer, plain, "some/policy.json")
    assert error.value.path == "some/policy.json"
    assert error.value.field == field
    assert error.value.found is not None
    assert error.value.expected == expected


@pytest.mark.parametrize(
    ("plain", "field", "near"), [({"cuont": 1}, "cuont", "count"), ({"inner": {"rat": 1}}, "inner.rat", "rate")]
)
def test_unknown_fields_offer_the_nearest(plain: dict[str, Any], field: str, near: str) -> None:
    with pytest.raises(InputError, match="unknown field") as error:
        from_plain(Outer, plain, "f.json")
    assert error.value.field == field
    assert near in str(error.value.hint)
    assert error.value.path == "f.json"


@pytest.mark.parametrize(("plain", "field"), [([1], None), ({"inner": 3}, "inner."), ({"inner": None}, "inner.")])
def test_an_object_is_expected(plain: Any, field: str | None) -> None:
    with pytest.raises(InputError, match="wrong configuration") as error:
        from_plain(Outer, plain, "f.json")
    assert error.value.expected == "an object"
    assert (error.value.field or "").rstrip(".") == (field or "").rstrip(".")


def test_a_field_without_default_that_is_missing() -> None:
    assert from_plain(Sizes, {"width": 2, "depth": None}, "f") == Sizes(2, None)
    with pytest.raises(InputError, match="missing") as error:
        from_plain(Sizes, {"width": 2}, "f.json")
    assert error.value.field == "depth"


def test_differences_name_every_leaf() -> None:
    old = to_plain(Outer())
    assert differences(old, to_plain(Outer())) == []
    new = to_plain(Outer(count=2, inner=Inner(("b",), 0.25)))
    assert differences(old, new) == ["count: 1 → 2", "inner.names: ['a'] → ['b']", "inner.rate: 0.5 → 0.25"]
    del new["flag"]
    assert "flag: False → None" in differences(old, new)
    assert differences({"a": {"b": 1}}, {"a": 3}) == ["a: {'b': 1} → 3"]
