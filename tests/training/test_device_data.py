"""Which data lie on a device; what is gathered there: tests/kernels/test_batches.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmdpd.data import TrajectoryDataset
from llmdpd.ops import triton
from llmdpd.tasks.metaworld.layout import LAYOUT
from llmdpd.training import device_data as module
from llmdpd.training.batches import BatchSampler
from llmdpd.utils.sharding import share_of

CUDA = torch.device("cuda")


@pytest.fixture
def dataset(metaworld_data: Callable[..., TrajectoryDataset]) -> TrajectoryDataset:
    return metaworld_data(("reach-v3",), 4, length=9)


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is put on a device with kernels, of which none is here."""
    calls: list[Any] = []

    class Placed(module.DeviceData):
        def __init__(self, dataset: TrajectoryDataset, device: torch.device, layout: Any) -> None:
            calls.append(layout)
            super().__init__(dataset, torch.device("meta"), layout)

    monkeypatch.setattr(module, "DeviceData", Placed)
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 41))
    return calls


def test_data_lie_on_the_device_where_there_is_room(
    dataset: TrajectoryDataset, placed: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = module.device_data(dataset, CUDA, LAYOUT)
    assert found is not None
    assert placed == [LAYOUT]
    assert caplog.messages == ["data lie on cuda: 0 MB"]
    columns = [column for column in found._columns.values() if column is not None]
    assert {column.device.type for column in columns} == {"meta"}
    assert sum(column.nbytes for column in columns) == module.bytes_of(dataset)
    for free, most in ((2 * module.bytes_of(dataset) - 2, 4 << 30), (1 << 40, module.bytes_of(dataset) - 1)):
        caplog.clear()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 41))
        monkeypatch.setattr(module, "_MOST_BYTES", most)
        assert module.device_data(dataset, CUDA, LAYOUT) is None
        assert caplog.messages == ["data stay on the host: 0 MB, and 0 MB of cuda are for them"]


def test_data_stay_where_no_kernel_gathers_them(
    dataset: TrajectoryDataset, placed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampler(device: torch.device = CUDA, **changes: Any) -> BatchSampler:
        arguments: dict[str, Any] = {"embeddings": None, "encoder": None, "seed": 0, "batch_size": 4, "prompts": 2}
        return BatchSampler(dataset, device=device, **(arguments | changes))

    assert sampler()._on_device is not None
    assert sampler(torch.device("cpu"))._on_device is None
    assert sampler(horizon=3)._on_device is None
    assert sampler(share=share_of(0, 2, 4, 2))._on_device is None
    monkeypatch.setattr(triton, "unavailable", lambda: "no kernels")
    assert sampler()._on_device is None
    assert len(placed) == 1
