from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.utils.device import check_device, matmul_precision


def test_matrix_products_change_within_the_block_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("fp32"):
        assert torch.get_float32_matmul_precision() == before
    with suppress(KeyError), matmul_precision("bf16"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="absent") as error:
        check_device("cuda")
    assert error.value.field == "device"
    assert "--device cpu" in str(error.value.hint)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1").index == 1
    with pytest.raises(InputError, match="absent"):
        check_device("cuda:2")
    assert check_device(torch.device("cuda", 0)).index == 0


@pytest.mark.parametrize(
    "name", ["gpu", "meta", "mps", "xpu", "cpu:3", "cuda:", "cuda:-1", "cuda:x", "", " cpu", "cpu\n"]
)
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no such device") as error:
        check_device(name)
    assert error.value.field == "device"
    assert "cpu, cuda" in str(error.value.expected)


def test_an_index_beyond_any_integer_is_an_absent_gpu() -> None:
    with pytest.raises(InputError, match="absent"):
        check_device("cuda:" + "9" * 30)
