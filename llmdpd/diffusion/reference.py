"""The reverse chain in plain PyTorch: any device, any float dtype, differentiable. The oracle for every fast path."""

from __future__ import annotations

import torch
from torch import Tensor

from llmdpd.diffusion.noise_mlp import NoiseMLP
from llmdpd.diffusion.schedules import SamplerPlan


def reverse_diffusion_reference(
    net: NoiseMLP, state: Tensor, prompt: Tensor, plan: SamplerPlan, noise: Tensor, precision: str = "fp32"
) -> Tensor:
    """Walk the chain from a_K to a_0 (paper, equation 4; the recurrence of `llmdpd.diffusion.schedules`).

    state [B, S], prompt [Z] or [B, Z], noise [K + 1, B, N, A] -> [B, N, A]. `bf16` runs the net's matrix products in
    bfloat16 and keeps the chain itself in the state's dtype.
    """
    low = precision == "bf16"
    with torch.autocast(state.device.type, dtype=torch.bfloat16, enabled=low):
        context = net.context(state, prompt)[:, None, :]
        time_rows = net.time_rows(torch.tensor(plan.timesteps).to(state.device))
    actions = plan.start * noise[0]
    x0_previous = torch.zeros_like(actions)
    for k in range(plan.steps):
        with torch.autocast(state.device.type, dtype=torch.bfloat16, enabled=low):
            epsilon = net.denoise(actions, context, time_rows[k])
        x0 = plan.p[k] * actions + plan.e[k] * epsilon.to(actions.dtype)
        if plan.clip is not None:
            x0 = x0.clamp(-plan.clip, plan.clip)
        mean = plan.A[k] * actions + plan.B[k] * x0 + plan.C[k] * x0_previous
        actions = mean + plan.S[k] * noise[k + 1] if plan.S[k] > 0 else mean
        x0_previous = x0
    return actions if plan.clip is None else actions.clamp(-plan.clip, plan.clip)
