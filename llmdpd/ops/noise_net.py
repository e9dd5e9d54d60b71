"""The noise network in training: one node of autograd's graph from its time embedding to the predicted noise.

`llmdpd.diffusion.NoiseMLP` defines it in PyTorch, which the tests hold this to. What depends on the diffusion step
alone is computed once a step, and what depends on the prompt alone once a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.ops import native, passes
from llmdpd.ops.nodes import Backward, node
from llmdpd.ops.operators import keeps_tape, tape_floats
from llmdpd.ops.passes import Array, Arrays

WEIGHTS = [
    f"{module}.{kind}"
    for module in ("time_mlp.1", "time_mlp.3", *(f"layers.{number}" for number in range(4)))
    for kind in ("weight", "bias")
]
"""Names of the weights, as in the state of `NoiseMLP`."""


def predict_noise(
    actions: Tensor, timesteps: Tensor, frequencies: Tensor, given: Mapping[str, Tensor], bf16: bool
) -> Tensor:
    """The noise [B, A] in actions [B, A] at the diffusion steps int64 [B], none of which has a gradient.

    Args:
        actions, timesteps: see above. frequencies: of the time embedding.
        given: `state` [B, S]; `prompt` [P, Z], those of P equal groups of the states; the `WEIGHTS`.
        bf16: whether the products of the hidden layers are in bfloat16.
    """
    levels, inverse = np.unique(timesteps.numpy(), return_inverse=True)
    place: NDArray[np.int64] = inverse.astype(np.int64)
    angles = levels[:, None].astype(np.float32) * native.array(frequencies)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    noisy = native.array(actions)
    return node(lambda arrays: _predict(noisy, waves, place, arrays, bf16), given)[0]


def _predict(
    actions: Array, waves: Array, place: NDArray[np.int64], given: Arrays, bf16: bool
) -> tuple[list[Array], Backward]:
    prompts, dim = given["prompt"].shape
    rows, time_backward = _time_rows(waves, given)
    x = np.concatenate([actions, rows[place], given["state"]], 1)
    weight = given["layers.0.weight"]
    own = x.shape[1]
    parts = {"prompt.weight": weight[:, own:], "prompt.bias": given["layers.0.bias"]}
    init, prompt_backward = passes.linear(given["prompt"], parts, "prompt")
    spread = np.repeat(init, len(x) // prompts, 0)
    trunk = [given[f"layers.{number}.{kind}"] for number in (1, 2, 3) for kind in ("weight", "bias")]
    arguments = native.module().MlpArguments(x, weight[:, :own], spread, trunk, bf16, native.threads())
    outputs, hidden = trunk[4].shape
    floats = tape_floats(len(x), hidden, outputs, 0, 1, 1, bf16)
    tape = native.module().pooled_buffer(floats) if keeps_tape(floats) else np.empty(0, np.float32)
    out = np.empty((len(x), outputs), np.float32)
    native.module().mlp_forward(arguments, out, tape)

    def backward(grads: Sequence[Array], gradients: dict[str, Array]) -> None:
        d_x, d_weight, d_init = np.empty_like(x), np.empty((hidden, own), np.float32), np.empty_like(spread)
        d_trunk = [gradients[f"layers.{number}.{kind}"] for number in (1, 2, 3) for kind in ("weight", "bias")]
        native.module().mlp_backward(arguments, grads[0], tape, d_x, d_weight, d_init, d_trunk)
        d_parts = {"prompt.weight": np.empty((hidden, dim), np.float32), "prompt.bias": gradients["layers.0.bias"]}
        gradients["prompt"][:] = prompt_backward(d_init.reshape(prompts, -1, hidden).sum(1), d_parts)
        gradients["layers.0.weight"][:, :own], gradients["layers.0.weight"][:, own:] = (
            d_weight,
            d_parts["prompt.weight"],
        )
        time_end = actions.shape[1] + rows.shape[1]
        gradients["state"][:] = d_x[:, time_end:]
        of_level = (place == np.arange(len(rows))[:, None]).astype(np.float32)
        time_backward(np.einsum("kb,bt->kt", of_level, d_x[:, actions.shape[1] : time_end]), gradients)

    return [out], backward


def _time_rows(waves: Array, weights: Arrays) -> tuple[Array, Callable[[Array, Arrays], None]]:
    """The time embedding [K, T] of waves [K, T]: two layers, Mish between them."""
    hidden, first_backward = passes.linear(waves, weights, "time_mlp.1")
    bent = np.tanh(np.logaddexp(np.float32(0.0), hidden))
    rows, second_backward = passes.linear(hidden * bent, weights, "time_mlp.3")

    def backward(grad: Array, gradients: Arrays) -> None:
        slope = bent + hidden * (1.0 - bent * bent) * np.exp(-np.logaddexp(np.float32(0.0), -hidden))
        first_backward(second_backward(grad, gradients) * slope, gradients, False)

    return rows, backward
