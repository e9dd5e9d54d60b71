"""A stand-in for the CUDA driver that records launches and computes nothing, and a count of PyTorch's operations.

Tensors lie on the CPU; kernels are compiled ahead of time for sm_90.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

FIELDS = ("kernel", "programs", "members", "threads", "shared", "stream", "device", "count")


class StandIn:
    """The fake library, and what it recorded."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self._names = (ctypes.c_char * 64 * 512).in_dll(self.library, "fake_names")
        self._launches = (ctypes.c_uint64 * 72 * 4096).in_dll(self.library, "fake_launches")

    def __getattr__(self, name: str) -> Any:
        return ctypes.c_int.in_dll(self.library, f"fake_{name}")

    def launches(self) -> list[tuple[str, dict[str, int], list[int]]]:
        """Kernel's name, fields and arguments of every launch since the last call."""
        found = []
        for record in self._launches[: self.count.value]:
            fields = dict(zip(FIELDS, record[:8], strict=True))
            found.append((self._names[fields["kernel"]].value.decode(), fields, list(record[8 : 8 + fields["count"]])))
        self.count.value = 0
        return found


class FakeGenerator:
    def __init__(self) -> None:
        self.offset = 8

    def initial_seed(self) -> int:
        return 5

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "libcuda-fake.so"
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", path, source], check=True, timeout=120)
    return path


@pytest.fixture
def stand_in(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    from llmdpd.kernels import driver
    from llmdpd.ops import resident

    fake = StandIn(library)
    generator = FakeGenerator()
    fake.count.value, fake.result.value, fake.current.value = 0, 0, 0
    monkeypatch.setattr(driver, "LIBRARY", str(library))
    monkeypatch.setattr(driver, "_kernels", {})
    monkeypatch.setattr(driver, "place_of", lambda tensor: driver.Place(0, 77, 90))
    monkeypatch.setattr(driver, "capturing", lambda: False)
    monkeypatch.setattr(driver, "generator", lambda device: generator)
    monkeypatch.setattr(resident, "_workspaces", {})
    monkeypatch.setattr(resident, "_nets", tuple(type(kept)() for kept in resident._nets))
    yield fake
    fake.result.value = 0


class Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def work(self) -> list[str]:
        """Those that a device would have work with: views and allocations are none."""
        idle = (
            "view",
            "reshape",
            "empty",
            "detach",
            "transpose",
            ".t.",
            "slice",
            "select",
            "unbind",
            "expand",
            "alias",
        )
        return [
            name for name in self.names if not any(word in name for word in (*idle, "squeeze", "split", "as_strided"))
        ]
