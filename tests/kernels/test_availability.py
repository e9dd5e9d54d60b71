from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import unittest.mock
from typing import Any

import pytest
import torch

from llmdpd import kernels

NO_VERSION = importlib.metadata.PackageNotFoundError("triton")


@pytest.mark.parametrize(
    ("version", "cuda", "interpret", "capability", "reason"),
    [
        ("3.6.0", True, "0", (9, 0), None),
        ("3.9.0", True, "0", (8, 0), None),
        ("3.7.1+git12345678", True, "0", (9, 0), None),
        ("3.7.1", False, "1", (9, 0), None),
        ("3.6.0", False, "1", (9, 0), "needs triton 3.7"),
        ("3.5.1", True, "0", (9, 0), "triton 3.5.1 is installed, and 3.6 to 3.9"),
        ("3.10.0", True, "0", (9, 0), "triton 3.10.0 is installed, and 3.6 to 3.9"),
        ("4.0.0", True, "0", (9, 0), "triton 4.0.0 is installed, and 3.6 to 3.9"),
        (NO_VERSION, True, "0", (9, 0), "pip install triton"),
        ("3.7.1", False, "0", (9, 0), "no CUDA device"),
        ("3.7.1", True, "0", (7, 5), "a card is of compute capability 7.5, and 8.0 is needed"),
    ],
)
def test_availability(
    monkeypatch: pytest.MonkeyPatch, version: Any, cuda: bool, interpret: str, capability: Any, reason: str | None
) -> None:
    found = unittest.mock.Mock(side_effect=[version])  # raises where it is an exception
    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    available, why = kernels.availability()
    assert available == (reason is None)
    assert (reason or "") in (why or "")


def test_importing_and_asking_imports_no_triton() -> None:
    code = "import sys; from llmdpd import kernels; assert 'torch' not in sys.modules; kernels.availability(); "
    code += "assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
