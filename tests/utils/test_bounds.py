"""Bounds beside fields."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.utils.bounds import Bounds, Count, Fraction, NonNegative, SharedByHeads, bounds_of, check_config


@dataclass(frozen=True)
class Layer(SharedByHeads):
    width: Count = 4
    heads: int = 2
    dropout: Fraction = 0.1


@dataclass(frozen=True)
class Model(Layer):
    lr: NonNegative = 0.1
    steps: Annotated[int | None, Bounds(1, 9)] = None
    layer: Layer = field(default_factory=Layer)


def test_bounds_of_a_dataclass_are_those_of_its_fields_and_its_bases() -> None:
    one, half = Bounds(1), Bounds(0, 1)
    assert bounds_of(Model) == {"width": one, "dropout": half, "lr": Bounds(0), "steps": Bounds(1, 9)}
    assert (str(half), str(one)) == ("0 to 1", "a finite number, at least 1")


@pytest.mark.parametrize("model", [Model(), Model(steps=1), Model(steps=9), Model(lr=0, dropout=1.0), Model(lr=1e300)])
def test_what_lies_within_passes(model: Model) -> None:
    check_config(model)


@pytest.mark.parametrize(
    ("changes", "name", "found", "expected"),
    [
        ({"width": "4"}, "width", "'4'", "a whole number"),
        ({"width": 4.0}, "width", "4.0", "a whole number"),
        ({"heads": True}, "heads", "True", "a whole number"),
        ({"steps": 2.5}, "steps", "2.5", "a whole number or none"),
        ({"lr": None}, "lr", "None", "a number"),
        ({"lr": [0.1]}, "lr", "[0.1]", "a number"),
        ({"layer": Layer(dropout="a")}, "layer.dropout", "'a'", "a number"),  # type: ignore[arg-type]
    ],
)
def test_what_is_of_another_type_is_named(changes: dict[str, Any], name: str, found: str, expected: str) -> None:
    with pytest.raises(InputError, match="another type") as error:
        check_config(Model(**changes))
    assert (error.value.field, error.value.found, error.value.expected) == (name, found, expected)


def test_numbers_of_numpy_are_numbers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_config(Model(width=np.int64(8), heads=np.int32(2), lr=np.float32(0.5), steps=np.uint8(3)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "name", "found"),
    [
        (Model(width=0), "width", 0),
        (Model(lr=math.inf), "lr", math.inf),
        (Model(lr=-1e-9), "lr", -1e-9),
        (Model(steps=10), "steps", 10),
        (Model(dropout=math.nan), "dropout", None),
        (Model(layer=Layer(dropout=1.1)), "layer.dropout", 1.1),
        (Model(heads=3), "heads", 3),
        (Model(layer=Layer(heads=3)), "layer.heads", 3),
    ],
)
def test_what_does_not_is_named(model: Model, name: str, found: Any) -> None:
    for prefix, path in (("", None), ("network", "policy.json")):
        with pytest.raises(InputError) as error:
            check_config(model, prefix, path)
        assert error.value.field == (f"{prefix}.{name}" if prefix else name)
        assert error.value.path == path
        assert found is None or error.value.found == found
