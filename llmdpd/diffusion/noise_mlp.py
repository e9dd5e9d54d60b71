"""The noise network: three hidden layers with Mish over [a_k, time, state, prompt], as in Diffusion-QL."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.ops import layers
from llmdpd.ops.arguments import Precision
from llmdpd.ops.mish_mlp import mish_mlp
from llmdpd.ops.nodes import Weights, parameters
from llmdpd.ops.noise_net import WEIGHTS, predict_noise


class SinusoidalTime(nn.Module):
    """Sinusoidal embedding of a time index: int64 [K] -> [K, dim] (Vaswani et al. 2017; Diffusion-QL's frequencies)."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        step = math.log(10000.0) / max(half - 1, 1)
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * -step), persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        phase = timesteps.to(self.frequencies.dtype)[:, None] * self.frequencies[None, :]
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class NoiseMLP(nn.Module):
    """epsilon(a_k, s, z, k): the noise in an action, given state, prompt vector and diffusion step (paper, equation 5).

    The first layer is linear in [a_k, time, state, prompt], so its state and prompt parts are computed once for
    each call (`context`) and not once for each step; `forward` and the sampler both use that split.

    Args:
        state_dim: S, of the state (features) [B, S].
        action_dim: A.
        prompt_dim: Z, of the prompt vector [Z] or [B, Z]; 0 for none.
        hidden_dim: H, width of the three hidden layers.
        time_dim: T, size of the time embedding (even).
    """

    def __init__(
        self, state_dim: int, action_dim: int, prompt_dim: int, hidden_dim: int = 256, time_dim: int = 16
    ) -> None:
        super().__init__()
        if time_dim < 2 or time_dim % 2:
            problem = "the time embedding consists of pairs of sine and cosine"
            raise InputError(problem, field="time_dim", found=time_dim, expected="an even number")
        self.state_dim, self.action_dim, self.prompt_dim = state_dim, action_dim, prompt_dim
        self.hidden_dim, self.time_dim = hidden_dim, time_dim
        self.time_mlp = nn.Sequential(
            SinusoidalTime(time_dim), nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim)
        )
        widths = [action_dim + time_dim + state_dim + prompt_dim, hidden_dim, hidden_dim, hidden_dim, action_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))

    @property
    def linears(self) -> list[nn.Linear]:
        """The four layers."""
        return cast("list[nn.Linear]", list(self.layers))

    @property
    def time_frequencies(self) -> Tensor:
        """The frequencies of the time embedding."""
        return cast("SinusoidalTime", self.time_mlp[0]).frequencies

    def time_embedding(self, timesteps: Tensor) -> Tensor:
        """Time indices int64 [K] -> [K, time_dim]."""
        embedding: Tensor = self.time_mlp(timesteps)
        return embedding

    def first_layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first layer as its parts: weights of a_k, time, state and prompt (each [H, ·]), and the bias [H]."""
        layer = self.linears[0]
        parts = layer.weight.split([self.action_dim, self.time_dim, self.state_dim, self.prompt_dim], dim=1)
        return (*parts, layer.bias)

    def context(self, state: Tensor, prompt: Tensor) -> Tensor:
        """u = W_s s + W_z z + b1: state [B, S], prompt [Z] or [B, Z] -> [B, H]. A prompt [Z] is multiplied once."""
        _, _, W_s, W_z, b1 = self.first_layer()
        return F.linear(state, W_s) + F.linear(prompt, W_z, b1)

    def denoise(self, a: Tensor, u: Tensor, tau: Tensor) -> Tensor:
        """epsilon from a_k [..., A], u [..., H] and tau_k = W_t time(k) [..., H] (broadcast together)."""
        W_a = self.first_layer()[0]
        h = F.mish(F.linear(a, W_a) + u + tau)
        for layer in self.layers[1:-1]:
            h = F.mish(layer(h))
        return self.layers[-1](h)

    def time_rows(self, timesteps: Tensor) -> Tensor:
        """tau_k = W_t time(k): int64 [K] -> [K, H]."""
        return F.linear(self.time_embedding(timesteps), self.first_layer()[1])

    def forward(
        self, actions: Tensor, timesteps: Tensor, state: Tensor, prompt: Tensor, precision: Precision = "fp32"
    ) -> Tensor:
        """epsilon: noisy actions [B, A], time indices int64 [B], state [B, S], prompt [Z] or [B, Z] -> [B, A].

        A prompt [P, Z] is those of P equal groups of states in their order. `bf16` runs the products of the hidden
        layers in bfloat16.
        """
        prompts = prompt if prompt.ndim == 2 else prompt[None]
        weights = None if actions.requires_grad else self.weights_natively(state, prompts)
        if weights is not None and layers.computes(actions):
            bf16 = precision == "bf16"
            return predict_noise(actions, timesteps, state, prompts, self.time_frequencies, weights, bf16)
        if prompt.ndim == 2 and len(prompt) < len(state):
            prompt = prompt[0] if len(prompt) == 1 else prompt.repeat_interleave(len(state) // len(prompt), 0)
        first, *rest = self.linears
        parts = [actions, self.time_embedding(timesteps), state]
        # A prompt that all share is multiplied once.
        shared = prompt.ndim == 1
        weight: Tensor = first.weight
        init: Tensor = first.bias
        if shared:
            inputs = weight.shape[1] - self.prompt_dim
            weight, init = weight[:, :inputs], F.linear(prompt, weight[:, inputs:], first.bias)
        return mish_mlp(torch.cat(parts if shared else [*parts, prompt], dim=1), weight, init, rest, precision)

    def weights_natively(self, state: Tensor, prompts: Tensor) -> Weights | None:
        """What the C++ code computes by in one node, where it does: in training, states in groups under prompts."""
        if not (torch.is_grad_enabled() and state.numel() and len(prompts)) or len(state) % len(prompts):
            return None
        return parameters(self, WEIGHTS) if layers.computes(state, prompts) else None
