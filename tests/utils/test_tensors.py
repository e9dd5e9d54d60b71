"""Tensors in files: a module takes all that it has names for and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.utils.tensors import load_tensors, write_tensors


def test_tensors_must_fit_all(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    weight, bias = torch.randn(2, 3), torch.randn(2)
    write_tensors(tmp_path / "m", {"weight": weight.t().contiguous().t(), "bias": nn.Parameter(bias)})
    load_tensors(module, safetensors.torch.load_file(tmp_path / "m"), Path("m"))
    assert torch.equal(module.weight, weight)
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"weight": weight}, "bias"),
        ({"weight": weight, "bias": bias, "more": bias}, "more"),
        ({"weight": weight.t(), "bias": bias}, "weight"),
    ]
    for tensors, name in cases:
        with pytest.raises(InputError, match="does not fit") as error:
            load_tensors(module, tensors, Path("m"))
        assert error.value.field == name
        assert error.value.path == "m"
