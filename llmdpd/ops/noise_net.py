"""The noise network in training: one node of autograd's graph from its time embedding to the predicted noise.

`llmdpd.diffusion.NoiseMLP` defines it in PyTorch, which the tests hold this to. What depends on the diffusion step
alone is computed once a step, and what depends on the prompt alone once a prompt.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.ops import native, operators
from llmdpd.ops.nodes import Array, Computation, Weights, node

WEIGHTS = tuple(
    f"{module}.{kind}"
    for module in ("time_mlp.1", "time_mlp.3", *(f"layers.{number}" for number in range(4)))
    for kind in ("weight", "bias")
)
"""Names of the weights, as in the state of `NoiseMLP`."""


def predict_noise(
    actions: Tensor,
    timesteps: Tensor,
    state: Tensor,
    prompt: Tensor,
    frequencies: Tensor,
    weights: Weights,
    bf16: bool,
) -> Tensor:
    """The noise [B, A] in actions [B, A] at the diffusion steps int64 [B], none of which has a gradient.

    Args:
        actions, timesteps: see above. state: [B, S]. prompt: [P, Z], those of P equal groups of the states.
        frequencies: of the time embedding. weights: the `WEIGHTS`, in their order.
        bf16: whether the products of the hidden layers are in bfloat16.
    """
    levels, inverse = np.unique(timesteps.numpy(), return_inverse=True)
    place: NDArray[np.int64] = inverse.astype(np.int64)
    angles = levels[:, None].astype(np.float32) * native.array(frequencies)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    noisy = native.array(actions)

    def compute(arrays: list[Array]) -> tuple[Computation, list[Array]]:
        keep, threads = operators.TAPE_LIMIT // 4, native.threads()
        computation = native.module().prediction_node(noisy, waves, place, arrays, bf16, keep, threads)
        return computation, [np.empty(noisy.shape, np.float32)]

    return node(compute, (state, prompt), weights)[0]
