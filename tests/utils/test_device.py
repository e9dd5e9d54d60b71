from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.utils.device import automatic_device, check_device, matmul_precision


def test_matrix_products_change_within_the_block_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("fp32"):
        assert torch.get_float32_matmul_precision() == before
    with suppress(KeyError), matmul_precision("bf16"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


NEW_SETTINGS = """
import sys, torch
from llmdpd.ops.triton import product_settings
from llmdpd.utils.device import bfloat16_products, matmul_precision, matmul_settings
for place, name, value, expected, short in (
    (torch.backends.cuda.matmul, "fp32_precision", "tf32", ("tf32", "none"), False),
    (torch.backends, "fp32_precision", "tf32", ("tf32", "tf32"), False),
    (torch.backends.mkldnn.matmul, "fp32_precision", "bf16", ("none", "bf16"), True),
):
    setattr(place, name, value)
    assert matmul_settings() == product_settings()[:2] == expected, matmul_settings()
    assert bfloat16_products() == short
    for precision in ("fp32", "bf16"):
        with matmul_precision(precision):
            assert bfloat16_products() == (short or precision == "bf16")
        assert matmul_settings() == expected, matmul_settings()
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
for name, short in (("medium", True), ("high", False), ("highest", False)):
    torch.set_float32_matmul_precision(name)
    before = matmul_settings()
    assert bfloat16_products() == short
    with matmul_precision("bf16"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert (torch.get_float32_matmul_precision(), matmul_settings()) == (name, before)
"""


def test_settings_of_products_are_known_by_whichever_api_they_were_set() -> None:
    """In a process of its own: they are the process's."""
    subprocess.run([sys.executable, "-c", NEW_SETTINGS], check=True, timeout=120)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="absent") as error:
        check_device("cuda")
    assert error.value.field == "device"
    assert "--device cpu" in str(error.value.hint)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="absent"):  # a driver that torch can't use: it sees them all the same
        check_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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


@pytest.mark.parametrize(
    ("there", "computes", "device", "why"),
    [
        (False, None, "cpu", "finds no GPU"),
        (
            True,
            RuntimeError("no kernel image is available\nmore"),
            "cpu",
            "does not work: no kernel image is available",
        ),
        (True, torch.cuda.DeferredCudaCallError("a call failed"), "cpu", "does not work: a call failed"),
        (True, AssertionError(), "cpu", "does not work: AssertionError()"),
        (True, 27.0, "cpu", "28 is 27 on it"),
        (True, 28.0, "cuda", "a card"),
    ],
)
def test_the_automatic_device_is_asked_to_compute(
    monkeypatch: pytest.MonkeyPatch, there: bool, computes: float | Exception | None, device: str, why: str
) -> None:
    def arange(*_: object, **options: object) -> torch.Tensor:
        assert options == {"device": "cuda"}
        if isinstance(computes, Exception):
            raise computes
        return torch.tensor([float(computes or 0), *[0.0] * 7])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    ones = torch.ones(8)
    monkeypatch.setattr(torch, "arange", arange)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: ones)
    monkeypatch.setattr("llmdpd.utils.device.automatic_device", automatic_device.__wrapped__)
    found, reason = automatic_device.__wrapped__()
    assert found == device
    assert why in reason
    assert check_device("auto") == torch.device(device)
