"""State features and what moments are compared by in Triton, against PyTorch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from llmdpd.nn import device_features
from llmdpd.nn.context import ContextConfig, RetrievalConfig, RetrievalContext
from llmdpd.nn.features import FeatureKind, StateFeatures
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import triton
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.layout import Layout, Point

S = 11
FLAT = Layout((Point("hand", (0, 3)), Point("thing", (1, 2), (5, 7)), Point("other", (8, 9))), scalars=(4, 10))
UPRIGHT = Layout((Point("hand", (2, 0, 1)), Point("thing", (3, 4, 5))), gripper=(7,), up=2, goal="thing", unit=0.5)


def states(device: torch.device, *leading: int) -> torch.Tensor:
    """Some of which lack a point, and one of which is none."""
    found = torch.randn(*leading, S, device=device)
    found.view(-1, S)[::3, [3, 4, 5]] = 0.0
    found.view(-1, S)[1::3, [1, 2]] = 0.0
    found.view(-1, S)[0, 10] = 1e4
    return found


@pytest.fixture
def by_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the kernel read states of the CPU where it is interpreted."""
    if device.type == "cpu":
        monkeypatch.setattr(device_features, "may_read", lambda state: state.dtype is torch.float32)
        monkeypatch.setattr(triton, "unavailable", lambda: None)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("normalised", None), ("combined", FLAT), ("relative", FLAT), ("relative", UPRIGHT), ("combined", UPRIGHT)],
)
def test_features_and_geometry(
    device: torch.device, close: Callable[..., None], kind: FeatureKind, layout: Layout | None
) -> None:
    features = StateFeatures(S, kind, layout)
    features.fit(torch.randn(50, S) * 3 + 1)
    exact, features = copy.deepcopy(features).double(), features.to(device)
    state = states(device, 3, 7)
    own, here = device_features.read(features, state, geometry=True)
    assert here is not None
    close(own, exact(state.cpu().double()), 2e-6)
    close(here, exact.geometry(state.cpu().double()), 2e-6)
    features.fit(torch.randn(50, S) * 2)  # statistics are read as they are
    exact.mean.copy_(features.mean)
    exact.std.copy_(features.std)
    close(device_features.read(features, state)[0], exact(state.cpu().double()), 2e-6)


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_context_sees_them_with_the_time(
    device: torch.device, by_kernel: None, close: Callable[..., None], timed: bool, whole: bool
) -> None:
    encoder = TrajectoryEncoderConfig(layers=1, width=8, inner=8, heads=2, steps=50, dropout=0.0)
    sizes = RetrievalConfig(width=8, heads=2, timestep_embedding=timed)
    config = ContextConfig("retrieval", features="relative", encoder=encoder, retrieval=sizes)
    context = RetrievalContext(Spaces(S, 3, 5, FLAT), config)
    exact, context = copy.deepcopy(context).double(), context.to(device)
    state, time = states(device, 2, 5), torch.randint(0, 500, (2, 5), device=device)
    time = time if whole else time.float()
    for found, wanted in zip(context._seen(state, time), exact._seen(state.cpu().double(), time.cpu()), strict=True):
        close(found, wanted, 2e-6)


def test_what_is_no_number_stays_none(device: torch.device, by_kernel: None) -> None:
    features = StateFeatures(S, "relative", FLAT).to(device)
    state = torch.full((1, S), float("nan"), device=device)
    assert features(state).isnan().all()
    assert features(state[:0]).shape == (0, features.output_dim)
    state = states(device, 4).requires_grad_()
    assert features(state).requires_grad  # by PyTorch: the kernel has no gradient
    assert device_features.reads(features, state.detach())
    assert not device_features.reads(StateFeatures(513), torch.zeros(1, 513))
