"""Random noise networks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from llmdpd.diffusion import NoiseMLP

MakeNet = Callable[..., NoiseMLP]


@pytest.fixture
def make_net(rng: np.random.Generator) -> MakeNet:
    """A network in which every weight and bias is random and none is zero."""

    def make(S: int, A: int, Z: int, H: int = 33, T: int = 8, dtype: torch.dtype = torch.float32) -> NoiseMLP:
        net = NoiseMLP(S, A, Z, H, T)
        with torch.no_grad():
            for parameter in net.parameters():
                scale = 1.3 / np.sqrt(parameter.shape[-1])
                parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape) * scale))
        return net.to(dtype)

    return make
