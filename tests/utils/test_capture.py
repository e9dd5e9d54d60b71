"""What a CUDA graph can't hold is found before a capture."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmdpd.utils.capture import watch


def draws() -> None:
    torch.rand(())


def waits() -> None:
    warnings.warn("called a synchronizing CUDA operation (Triggered internally at …)", stacklevel=2)


@pytest.mark.parametrize(("act", "reason"), [(draws, "random numbers on the host"), (waits, "waits for the device")])
def test_watching_tells_what_a_graph_cannot_hold(act: Callable[[], None], reason: str) -> None:
    def work() -> dict[str, Tensor]:
        act()
        return {}

    found = watch(work)[1]
    assert found is not None
    assert reason in found


def test_watching_keeps_results_and_other_warnings() -> None:
    def warns() -> dict[str, Tensor]:
        warnings.warn("something else", stacklevel=2)
        return {"x": torch.ones(())}

    with pytest.warns(UserWarning, match="something else"):
        assert watch(warns) == ({"x": torch.ones(())}, None)
