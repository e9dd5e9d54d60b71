"""`reverse_diffusion`: one operation, its backends and how one is chosen."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from llmdpd.diffusion import native
from llmdpd.diffusion.noise_mlp import NoiseMLP
from llmdpd.diffusion.philox import philox_normal
from llmdpd.diffusion.reference import reverse_diffusion_reference
from llmdpd.diffusion.schedules import SamplerPlan
from llmdpd.errors import InputError

Backend = Literal["auto", "reference", "cpp", "triton"]
Precision = Literal["fp32", "bf16"]

_log = logging.getLogger(__name__)
_NO_BACKWARD = "it has no backward pass yet: call it under torch.no_grad(), or use backend='reference' for gradients"


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name that cannot run here; the message says why and what would mend it."""


def reverse_diffusion(
    net: NoiseMLP,
    state: Tensor,
    prompt: Tensor,
    plan: SamplerPlan,
    samples: int = 1,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    backend: Backend = "auto",
    precision: Precision = "fp32",
) -> Tensor:
    """Draw actions a_0 by walking the reverse chain (paper, equation 4).

    Args:
        net: the noise network.
        state: [B, S], B from 0.
        prompt: [Z] (one task) or [B, Z].
        plan: from `sampler_plan`.
        samples: N actions a state.
        seed: key of the counter-based noise; by default drawn from torch's global generator, so that
            `torch.manual_seed` governs it. An int64 tensor [B] gives each state a stream of its own, independent of the
            batch that the state is in.
        noise: instead of a seed, [K + 1, B, A] (or [K + 1, B, N, A]): the start first, then one draw a step in the
            order that they are used. The plan's noise scale applies to it as well.
        backend: `reference` (PyTorch), `cpp` (CPU, float32, no gradient yet), `triton`; `auto` takes the fastest that
            can run and logs once why another could not.
        precision: `bf16` runs the matrix products in bfloat16.

    Returns:
        [B, A], or [B, N, A] where samples > 1; differentiable in net, state and prompt.

    Raises:
        InputError: shapes or dtypes that do not fit together, or an unknown backend or precision.
        BackendUnavailableError: a backend asked for by name that cannot run.
    """
    _check(net, state, prompt, plan, samples, seed, noise, backend, precision)
    if seed is None and noise is None:
        seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    if seed is not None and not isinstance(seed, Tensor):
        seed = int(seed)  # numpy's integers too
    chosen = _choose(net, state, prompt, backend, precision)
    if chosen == "cpp":
        return native.forward(
            net, plan, state, prompt, samples=samples, seed=seed, noise=noise, threads=torch.get_num_threads()
        )
    batch = state.shape[0]
    if noise is None:
        assert seed is not None
        draws = philox_normal(seed, batch, samples, plan.steps + 1, net.action_dim, state.device).to(state.dtype)
    else:
        draws = noise.reshape(plan.steps + 1, batch, samples, net.action_dim)
    actions = reverse_diffusion_reference(net, state, prompt, plan, draws, precision)
    return actions if samples > 1 else actions[:, 0]


def _choose(net: NoiseMLP, state: Tensor, prompt: Tensor, backend: str, precision: str) -> str:
    """The backend to run: the one asked for, or for `auto` the fastest that can."""
    if backend == "reference":
        return backend
    if backend == "triton":
        raise BackendUnavailableError(triton_obstacle())
    obstacle = _cpp_obstacle(net, state, prompt, precision)
    if obstacle is None:
        return "cpp"
    if backend == "cpp":
        raise BackendUnavailableError(f"the cpp backend cannot run: {obstacle}")
    # That a gradient needs the reference is how training works, not news.
    level = logging.DEBUG if obstacle == _NO_BACKWARD else logging.INFO
    _log_once(triton_obstacle() if state.is_cuda else obstacle, level)
    return "reference"


def _cpp_obstacle(net: NoiseMLP, state: Tensor, prompt: Tensor, precision: str) -> str | None:
    if not native.available()[0]:
        return native.available()[1]
    if state.device.type != "cpu":
        return f"tensors are on {state.device}, the C++ sampler runs on the CPU: move them there or use another backend"
    if precision != "fp32" or {state.dtype, prompt.dtype, net.layers[0].weight.dtype} != {torch.float32}:
        return "it computes in float32 alone: use precision='fp32' and float32 tensors, or backend='reference'"
    tensors = (state, prompt, *net.parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _NO_BACKWARD
    return None


def triton_obstacle() -> str:
    """Why the Triton backend cannot run here."""
    try:
        from llmdpd import kernels
    except ImportError:
        return "the triton backend cannot run: llmdpd.kernels is not here, llmdpd was never installed (pip install .)"
    return f"the triton backend cannot run: {kernels.availability()[1]}"


@lru_cache(maxsize=64)
def _log_once(obstacle: str | None, level: int) -> None:
    _log.log(level, "reverse_diffusion runs on the reference backend: %s", obstacle)


def _check(
    net: NoiseMLP,
    state: Tensor,
    prompt: Tensor,
    plan: SamplerPlan,
    samples: int,
    seed: int | Tensor | None,
    noise: Tensor | None,
    backend: str,
    precision: str,
) -> None:
    """Raise `InputError` for anything that does not fit, before native code sees it."""
    if backend not in get_args(Backend):
        raise InputError("unknown backend", field="backend", found=backend, expected=get_args(Backend))
    if precision not in get_args(Precision):
        raise InputError("unknown precision", field="precision", found=precision, expected=get_args(Precision))
    if samples < 1:
        raise InputError("at least one action a state", field="samples", found=samples, expected="1 or more")
    if state.ndim != 2 or state.shape[1] != net.state_dim:
        raise InputError("wrong shape", field="state", found=tuple(state.shape), expected=f"[B, {net.state_dim}]")
    batch = state.shape[0]
    if tuple(prompt.shape) not in {(net.prompt_dim,), (batch, net.prompt_dim)}:
        expected = f"[{net.prompt_dim}] or [{batch}, {net.prompt_dim}]"
        raise InputError("wrong shape", field="prompt", found=tuple(prompt.shape), expected=expected)
    weight = next(net.parameters())
    mixed = torch.is_autocast_enabled(weight.device.type)  # autocast brings dtypes together by itself
    for name, tensor in (("state", state), ("prompt", prompt), ("noise", noise)):
        if tensor is None:
            continue
        fits = tensor.dtype == weight.dtype or (mixed and tensor.is_floating_point())
        if not fits or tensor.device != weight.device:
            found, expected = (f"{t.dtype} on {t.device}" for t in (tensor, weight))
            raise InputError("wrong kind of tensor", field=name, found=found, expected=f"{expected}, as the net")
    if seed is not None and noise is not None:
        raise InputError(
            "seed and noise exclude each other", field="seed", found=seed, expected="None where noise is given"
        )
    if isinstance(seed, Tensor) and (seed.shape != (batch,) or seed.dtype != torch.int64):
        found = f"{seed.dtype} {tuple(seed.shape)}"
        raise InputError("wrong kind of seeds", field="seed", found=found, expected=f"an int, or int64 [{batch}]")
    if not (seed is None or isinstance(seed, (Tensor, SupportsIndex))):
        raise InputError("wrong kind of seed", field="seed", found=seed, expected=f"an int, or int64 [{batch}]")
    if noise is not None:
        full = (plan.steps + 1, batch, samples, net.action_dim)
        allowed = {full} if samples > 1 else {full, (plan.steps + 1, batch, net.action_dim)}
        if tuple(noise.shape) not in allowed:
            raise InputError(
                "wrong shape", field="noise", found=tuple(noise.shape), expected=" or ".join(map(str, allowed))
            )
