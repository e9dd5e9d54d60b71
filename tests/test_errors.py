from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from llmdpd.errors import InputError, abridged, located, nearest_names


def test_message_names_file_field_found_expected_and_hint() -> None:
    error = InputError("it broke", path=Path("a/b.json"), field="x.y", found=3, expected=[1, 2], hint="do this")
    assert str(error).splitlines() == [
        "it broke",
        "  file:     a/b.json",
        "  field:    x.y",
        "  found:    3",
        "  expected: [1, 2]",
        "  hint:     do this",
    ]
    assert isinstance(error, ValueError)


def test_what_is_not_given_is_left_out_and_zero_is_given() -> None:
    assert str(InputError("it broke")) == "it broke"
    assert str(InputError("it broke", found=0, expected="")).splitlines() == [
        "it broke",
        "  found:    0",
        "  expected: ",
    ]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_everything(protocol: int) -> None:
    error = InputError("p", path=Path("f"), field="a", found={"b": 1}, expected=(1,), hint="h")
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is InputError
    assert str(copy) == str(error)
    for name in ("problem", "path", "field", "found", "expected", "hint"):
        assert getattr(copy, name) == getattr(error, name)


def test_a_long_list_is_abridged() -> None:
    assert [abridged("abcd"[:count], 2) for count in (1, 2, 4)] == ["a", "a, b", "a, b and 2 more"]
    assert abridged(["x", "y"], 1, "; ") == "x and 1 more"


def test_nearest_names() -> None:
    known = ["push-v3", "push-back-v3", "reach-v3", "sweep-v3"]
    assert nearest_names("pusch-v3", known).split(", ")[0] == "push-v3"
    assert nearest_names("pusch-v3", known, 1) == "push-v3"
    assert nearest_names("0", known, 2) == "push-back-v3, push-v3"  # nothing is near: the first ones
    assert nearest_names("x", []) == ""


@pytest.mark.parametrize(
    ("inner", "outer", "path", "field"),
    [
        ({}, {"path": "f", "field": "a"}, "f", "a"),
        ({"field": "b"}, {"path": "f", "field": "a"}, "f", "a.b"),
        ({"path": "nearer", "field": "b"}, {"path": "f"}, "nearer", "b"),
        ({}, {}, None, None),
    ],
)
def test_an_error_is_completed_by_who_knows_its_place(
    inner: dict[str, str], outer: dict[str, str], path: str | None, field: str | None
) -> None:
    with pytest.raises(InputError) as error, located(**outer):
        raise InputError("wrong", found=1, expected=2, hint="mend it", **inner)
    assert (error.value.path, error.value.field) == (path, field)
    assert (error.value.problem, error.value.found, error.value.expected) == ("wrong", 1, 2)
    assert error.value.hint == "mend it"
