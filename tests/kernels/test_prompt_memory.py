"""What the retrieval context keeps of demonstrations as they are, in Triton, against PyTorch: the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.nn.context import ContextConfig, Keep, RetrievalConfig, RetrievalContext
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import device_memory, triton
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.tasks.layout import Layout, Point

S, A, D = 6, 3, 5
LAYOUT = Layout((Point("hand", (0, 1)), Point("thing", (2, 3))), scalars=(5,))
RAW = ("bias", "waypoint_bias", "waypoints", "there")


@pytest.mark.parametrize(
    ("lengths", "kept", "sizes"),
    [
        ((4, 7, 1), None, {}),
        ((4, 7, 33), (1.0, 0.0, 1.0), {"lookahead": (0, 2, 40)}),
        ((5, 5), (0.0, 0.0), {"geometric_similarity": False, "lookahead": (3,)}),
        ((9,), None, {"timestep_embedding": False}),
        ((2, 8), (1.0, 1.0), {"attention": False}),
    ],
)
@pytest.mark.parametrize("features", ["relative", "normalised"])
def test_the_raw_memory(
    device: torch.device,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    kept: tuple[float, ...] | None,
    sizes: dict[str, Any],
    features: Any,
) -> None:
    encoder = TrajectoryEncoderConfig(layers=1, width=8, inner=8, heads=2, steps=50, dropout=0.0)
    retrieval = RetrievalConfig(width=8, heads=2, **sizes)
    config = ContextConfig(
        "retrieval",
        text_dim=7,
        text_hidden=8,
        trajectory_dim=3,
        features=features,
        encoder=encoder,
        retrieval=retrieval,
    )
    context = RetrievalContext(Spaces(S, A, D, LAYOUT), config).to(device)
    shown = [(rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32)) for n in lengths]
    tokens = make_tokens(shown, encoder).to(device)
    keep = Keep(None, None if kept is None else torch.tensor(kept, device=device)[:, None])
    text = torch.randn(len(lengths), D, device=device)
    with torch.no_grad():
        monkeypatch.setattr(device_memory, "may_read", lambda states: False)
        wanted = context.encode(text, tokens, keep).memory
        monkeypatch.setattr(device_memory, "may_read", lambda states: True)
        monkeypatch.setattr(triton, "unavailable", lambda: None)
        asked: list[int] = []
        read = device_memory.read
        monkeypatch.setattr(device_memory, "read", lambda *a: asked.append(1) or read(*a))
        found = context.encode(text, tokens, keep).memory
    assert asked == [1]
    assert set(found) == set(wanted)
    for name in RAW:
        assert (name in found) == (name != "there" or retrieval.geometric_similarity)
        if name in found:
            assert torch.equal(found[name], wanted[name]), name
            assert found[name].shape == wanted[name].shape
