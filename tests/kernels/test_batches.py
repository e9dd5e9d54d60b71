"""Batches gathered from data on the device: those that the host would make, by the same random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from llmdpd.data import TrajectoryDataset
from llmdpd.data.augmentation import AugmentationConfig
from llmdpd.kernels.launch import Launch
from llmdpd.methods.batch import PromptedBatch
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.layout import Layout, Point
from llmdpd.tasks.metaworld.layout import LAYOUT
from llmdpd.training.batches import BatchSampler
from llmdpd.training.device_data import DeviceData

ENCODER = TrajectoryEncoderConfig(steps=6, sampling="window")
ALL = AugmentationConfig(offset=0.04, rotate=0.7, mirror=0.5)
FLAT = Layout((Point("hand", (0, 2)), Point("thing", (5, 4), (7, 8))), scalars=(1,), move=(3, 0))
CASES: dict[str, dict[str, Any]] = {
    "default": dict(augmentation=(ALL, LAYOUT), dropout=(0.3, 0.4), self_prompted=0.5, encoder=ENCODER),
    "jitter alone": dict(augmentation=(AugmentationConfig(offset=0.1), LAYOUT), encoder=ENCODER),
    "in a plane": dict(augmentation=(ALL, FLAT), encoder=ENCODER),
    "unchanged": dict(encoder=TrajectoryEncoderConfig(steps=4)),
    "no prompts": dict(encoder=None, embeddings=None, prompts=1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("expert", [True, False])
def test_batches_are_the_hosts(
    device: torch.device, metaworld_data: Callable[..., TrajectoryDataset], rng: np.random.Generator, name: str,
    expert: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    launched, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: launched.append(self.kernel.__name__) or run(self))
    data = metaworld_data(("reach-v3", "push-v3"), 4, seed=int(rng.integers(1000)), length=9)
    data.observations[::3, 4:7] = 0.0  # an absent point
    if not expert:
        data = dataclasses.replace(data, expert_actions=None)
    options: dict[str, Any] = {"embeddings": torch.randn(2, 5), "batch_size": 12, "prompts": 2, "seed": 3} | CASES[name]
    host = BatchSampler(data, device=torch.device("cpu"), **options)
    there = BatchSampler(data, device=device, **options)
    changed = options.get("augmentation", (None, None))[1]
    there._on_device = DeviceData(data, device, changed)
    for _ in range(3):
        same(there.next(), host.next(), exact=device.type == "cpu")
    assert there.state() == host.state()
    assert launched == 3 * ["batch_kernel"]


def same(found: PromptedBatch, wanted: PromptedBatch, exact: bool) -> None:
    leaves = found.leaves()
    for name, leaf in wanted.leaves().items():
        if not isinstance(leaf, torch.Tensor):
            assert leaves[name] == leaf, name
            continue
        assert leaves[name].dtype == leaf.dtype, name
        assert leaves[name].is_contiguous(), name
        # A device may round a product and a sum once.
        torch.testing.assert_close(leaves[name].cpu(), leaf, rtol=0, atol=0 if exact else 1e-6, msg=name)
