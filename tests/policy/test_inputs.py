"""What is no array of real numbers is refused where a policy is given it, though NumPy would make numbers of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.nn.spaces import ActionScaling, Spaces
from llmdpd.policy.inputs import read_observations, read_rewards, recorded

_NONE: dict[str, Callable[[int], Any]] = {
    "complex": lambda n: np.ones(n, complex),
    "dates": lambda n: np.zeros(n, "M8[s]"),
    "texts": lambda n: np.array(["1"] * n),
    "fields": lambda n: np.zeros(n, [("x", "f4")]),
    "masked": lambda n: np.ma.masked_array(np.ones(n), mask=np.arange(n) == 0),
    "learned": lambda n: torch.ones(n, requires_grad=True),
}


@pytest.mark.parametrize("what", _NONE)
def test_what_is_no_real_numbers_is_refused(what: str) -> None:
    values, spaces = _NONE[what](3), Spaces(2, 3, 0)
    for call in (
        lambda: read_observations(values, 3),
        lambda: read_observations({"a": values}, 3, ["a"]),
        lambda: read_rewards(values, 3),
        lambda: recorded((np.ones((1, 2)), values[None]), spaces, ActionScaling(spaces), ()),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize("kind", ["f2", ">f4", "f8", "i8", "u1", "?", "O"])
def test_real_numbers_of_any_kind_are_read(kind: str, rng: np.random.Generator) -> None:
    values = rng.integers(0, 2, 3).astype(kind)
    np.testing.assert_array_equal(read_observations(values, 3), values.astype(np.float32))
    np.testing.assert_array_equal(read_rewards(torch.ones(3), 3), 1)
