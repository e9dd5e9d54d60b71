"""The reverse chain in plain PyTorch: any device, any float dtype, differentiable. The oracle for every fast path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmdpd.diffusion.noise_mlp import NoiseMLP
from llmdpd.diffusion.on_device import coefficient_tensors
from llmdpd.ops.arguments import SamplerCoefficients


def reverse_diffusion_reference(
    net: NoiseMLP, state: Tensor, prompt: Tensor, plan: SamplerCoefficients, noise: Tensor, precision: str = "fp32"
) -> Tensor:
    """Compute a_0 by the reverse chain (paper, equation 4; the recurrence of `llmdpd.diffusion.schedules`).

    state [B, S], prompt [Z] or [B, Z], noise [K + 1, B, N, A] -> [B, N, A]. `bf16` runs the net's matrix products in
    bfloat16 and keeps the chain itself in the state's dtype.
    """
    low = precision == "bf16"
    with torch.autocast(state.device.type, dtype=torch.bfloat16, enabled=low):
        u = net.context(state, prompt)[:, None, :]
        tau = net.time_rows(coefficient_tensors(plan.content, state.device)[0])

    def epsilon(actions: Tensor, k: int) -> Tensor:
        with torch.autocast(state.device.type, dtype=torch.bfloat16, enabled=low):
            return net.denoise(actions, u, tau[k])

    return walk_chain(plan, noise, epsilon)


def walk_chain(
    plan: SamplerCoefficients,
    noise: Tensor,
    epsilon: Callable[[Tensor, int], Tensor],
    hold: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """The recurrence of `llmdpd.diffusion.schedules` for actions, trajectories or anything else that is denoised.

    Args:
        plan: the sampler's coefficients.
        noise: [K + 1, …], the start first, then one for each step; without stochastic steps the start suffices.
        epsilon: the predicted noise of x […] at row k of the table.
        hold: writes what is known into x, before every step and at the end (inpainting); by default nothing.

    Returns:
        x after the last step […].
    """
    x = hold(plan.start * noise[0])
    x0_previous = torch.zeros_like(x)
    for k in range(plan.steps):
        x0 = plan.p[k] * x + plan.e[k] * epsilon(x, k).to(x.dtype)
        if plan.clip is not None:
            x0 = x0.clamp(-plan.clip, plan.clip)
        mean = plan.A[k] * x + plan.B[k] * x0 + plan.C[k] * x0_previous
        x = hold(mean + plan.S[k] * noise[k + 1] if plan.S[k] > 0 else mean)
        x0_previous = x0
    return x if plan.clip is None else x.clamp(-plan.clip, plan.clip)
