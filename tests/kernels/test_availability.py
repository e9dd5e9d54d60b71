from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from llmdpd import kernels


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One where everything is as it should be."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.7.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return monkeypatch


def test_available(machine: pytest.MonkeyPatch) -> None:
    assert kernels.availability() == (True, None)


def test_the_interpreter_needs_no_device(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setenv("TRITON_INTERPRET", "1")
    assert kernels.availability() == (True, None)
    machine.setattr(importlib.metadata, "version", lambda name: "3.6.0")
    available, why = kernels.availability()
    assert not available
    assert "needs triton 3.7" in str(why)


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_another_version_of_triton(machine: pytest.MonkeyPatch, version: str) -> None:
    machine.setattr(importlib.metadata, "version", lambda name: version)
    available, why = kernels.availability()
    assert not available
    assert version in str(why)
    assert "3.6 to 3.9" in str(why)


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0", "3.7.1+git12345678"])
def test_versions_that_do(machine: pytest.MonkeyPatch, version: str) -> None:
    machine.setattr(importlib.metadata, "version", lambda name: version)
    assert kernels.availability() == (True, None)


def test_no_triton(machine: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    machine.setattr(importlib.metadata, "version", version)
    assert "pip install triton" in str(kernels.availability()[1])


def test_no_device(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(kernels.availability()[1])


def test_an_old_device(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert kernels.availability() == (False, "a card is of compute capability 7.5, and 8.0 is needed")


def test_importing_and_asking_imports_no_triton() -> None:
    code = "import sys; from llmdpd import kernels; assert 'torch' not in sys.modules; kernels.availability(); "
    code += "assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
