"""`reverse_diffusion`: the one call of the reverse chain, and how its backend is chosen.

| backend | gradient | where it is computed |
| --- | --- | --- |
| `cpp` | no | `llmdpd.ops.inference`: weights packed once, the whole call in C++ |
| `triton` | no | `llmdpd.ops.resident`: weights packed once, the whole call in one launch |
| `cpp` | yes | `llmdpd.ops.noise_net`: one node of autograd's graph, the whole pass in C++ |
| `cpp`, `triton` | yes, or in a capture | `llmdpd.ops.autograd`: the operators, in C++ or Triton |
| `reference` | either | `llmdpd.diffusion.reference`: plain PyTorch |
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.diffusion.noise_mlp import NoiseMLP
from llmdpd.diffusion.on_device import coefficient_tensors
from llmdpd.diffusion.reference import reverse_diffusion_reference
from llmdpd.errors import InputError
from llmdpd.ops import autograd, inference, native, resident, triton
from llmdpd.ops.arguments import ChainArguments, Precision, SamplerCoefficients, check_seed, check_shapes
from llmdpd.ops.noise_net import sample_actions
from llmdpd.ops.philox import philox_normal, signed64

Backend = Literal["auto", "reference", "cpp", "triton"]

_log = logging.getLogger(__name__)


class BackendUnavailableError(RuntimeError):
    """A backend requested by name that cannot run here; the message says why and what would help."""


class _Call(NamedTuple):
    """The arguments of `reverse_diffusion`."""

    net: NoiseMLP
    state: Tensor
    prompt: Tensor
    plan: SamplerCoefficients
    samples: int
    seed: int | Tensor | None
    noise: Tensor | None
    backend: str
    precision: str


def reverse_diffusion(
    net: NoiseMLP,
    state: Tensor,
    prompt: Tensor,
    plan: SamplerCoefficients,
    samples: int = 1,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    backend: Backend = "auto",
    precision: Precision = "fp32",
) -> Tensor:
    """Sample actions a_0 by the reverse chain (paper, equation 4).

    Args:
        net: the noise network.
        state: [B, S], B from 0.
        prompt: [Z] (one task) or [B, Z].
        plan: the sampler's coefficients, from `sampler_coefficients`.
        samples: N actions for each state.
        seed: key of the counter-based noise; by default a random number of torch's global generator, which
            `torch.manual_seed` governs. With an int64 tensor [B] the noise of each state depends on its own seed only,
            and not on the batch that the state is in.
        noise: instead of a seed, [K + 1, B, A] (or [K + 1, B, N, A]): the start first, then one for each step in the
            order of use. The plan's noise scale applies to it as well.
        backend: `reference` (PyTorch, any device and dtype), `cpp` (CPU, float32 tensors), `triton` (CUDA, float32
            tensors); `auto` chooses the fastest that can run and logs once why another could not.
        precision: `bf16` computes the matrix products of the hidden layers in bfloat16, summed in float32.

    Returns:
        [B, A], or [B, N, A] where samples > 1; differentiable in net, state and prompt.

    Raises:
        InputError: shapes or dtypes that do not fit together, or an unknown backend or precision.
        BackendUnavailableError: a backend requested by name that cannot run.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and noise is None and precision in ("fp32", "bf16"):
        actions = None
        if type(state) is Tensor and state.is_cuda:
            if backend in ("auto", "triton"):
                actions = resident.sample_again(net, plan, state, prompt, samples, seed, precision == "bf16")
        elif backend in ("auto", "cpp") and (seed is None or type(seed) is int):
            actions = inference.sample_again(net, plan, state, prompt, samples, seed, precision == "bf16")
        if actions is not None:
            return actions
    call = _Call(net, state, prompt, plan, samples, seed, noise, backend, precision)
    _check(call)
    chosen, bf16 = _choose(call), precision == "bf16"
    needs_grad = torch.is_grad_enabled() and (
        state.requires_grad or prompt.requires_grad or any(t.requires_grad for t in net.parameters())
    )
    if chosen == "cpp" and not needs_grad and not compiling:
        return inference.sample(net, plan, state, prompt, samples, seed, noise, bf16)
    if chosen == "triton" and not needs_grad and noise is None and resident.eager(state):
        return resident.sample(net, plan, state, prompt, samples, seed, bf16)
    xi = None if noise is None else noise.reshape(plan.steps + 1, state.shape[0], samples, net.action_dim)
    if chosen == "reference":
        xi = _noise(call) if xi is None else xi
        actions = reverse_diffusion_reference(net, state, prompt, plan, xi, precision)
    else:
        actions = _with_gradient(call, xi, needs_grad)
    return actions if samples > 1 else actions[:, 0]


def _with_gradient(call: _Call, xi: Tensor | None, needs_grad: bool) -> Tensor:
    """a_0 [B, N, A]: by one node where the C++ code can compute all of it, else by the operators."""
    net, state = call.net, call.state
    prompt = call.prompt if call.prompt.ndim == 2 else call.prompt[None]
    weights = net.weights_natively(state, prompt) if needs_grad else None
    if weights is None:
        return autograd.reverse_diffusion(_arguments(call, xi), needs_grad)
    key, frequencies = _given_key(call, xi), net.time_frequencies
    return sample_actions(
        state, prompt, call.plan, call.samples, key, xi, frequencies, weights, call.precision == "bf16"
    )


def _given_key(call: _Call, xi: Tensor | None) -> Tensor:
    """The noise's key, of no meaning where noise is given."""
    return _key(call.seed if xi is None else 0, call.state.device)


def _key(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The noise's key, int64 [1] or [B], on the device; by default a random one, made there: nothing waits for it."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device)
    return torch.full((1,), signed64(seed), dtype=torch.int64, device=device)  # filled there: no copy to wait for


def _noise(call: _Call) -> Tensor:
    """xi [K + 1, B, N, A] from the seed, on the state's device and in its dtype."""
    state, batch, key = call.state, call.state.shape[0], _key(call.seed, call.state.device)
    key = key if isinstance(call.seed, Tensor) else key[0]  # one for all states
    xi = philox_normal(key, batch, call.samples, call.plan.steps + 1, call.net.action_dim, state.device)
    return xi.to(state.dtype)


def _arguments(call: _Call, xi: Tensor | None) -> ChainArguments:
    """The operator's arguments: what does not depend on the step is computed in torch, W_s s excepted."""
    net, state, plan = call.net, call.state, call.plan
    timesteps, table = coefficient_tensors(plan.content, state.device)
    with torch.autocast(state.device.type, enabled=False):
        W_a, _, W_s, W_z, b1 = net.first_layer()
        u_z = F.linear(call.prompt, W_z, b1)
        tau = net.time_rows(timesteps)
    trunk = [part for layer in net.linears[1:] for part in (layer.weight, layer.bias)]
    key, bf16 = _given_key(call, xi), call.precision == "bf16"
    return ChainArguments(state, W_s, u_z, tau, W_a, trunk, table, key, xi, plan.start, plan.bound, call.samples, bf16)


def _choose(call: _Call) -> str:
    """The backend that runs: the requested one, or for `auto` the fastest that can."""
    if call.backend == "reference":
        return call.backend
    name = call.backend if call.backend != "auto" else "triton" if call.state.is_cuda else "cpp"
    reason = _cannot_run(name, call)
    if reason is None:
        return name
    reason = f"the {name} backend cannot run: {reason}"
    if call.backend != "auto":
        raise BackendUnavailableError(reason)
    _log_once(reason)
    return "reference"


def _cannot_run(name: str, call: _Call) -> str | None:
    """Why a backend cannot run here, on these tensors; None where it can."""
    missing = native.available()[1] if name == "cpp" else triton.unavailable()
    if missing is not None:
        return missing
    device, found = "cpu" if name == "cpp" else "cuda", call.state.device
    if found.type != device:
        return f"tensors are on {found}, and it runs on {device}: move them there or use another backend"
    if {call.state.dtype, call.prompt.dtype, call.net.layers[0].weight.dtype} != {torch.float32}:
        return "it takes float32 only: use float32 tensors, or backend='reference'"
    if call.noise is not None and call.noise.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for given noise: use backend='reference'"
    return None


@lru_cache(maxsize=64)
def _log_once(reason: str) -> None:
    _log.info("reverse_diffusion runs on the reference backend: %s", reason)


def _check(call: _Call) -> None:
    """Raise `InputError` for anything that does not fit, before native code sees it."""
    net, state, prompt, plan, samples, seed, noise, backend, precision = call
    if backend not in get_args(Backend):
        raise InputError("unknown backend", field="backend", found=backend, expected=get_args(Backend))
    if precision not in get_args(Precision):
        raise InputError("unknown precision", field="precision", found=precision, expected=get_args(Precision))
    batch = check_shapes(net, state, prompt, samples)
    weight = next(net.parameters())
    mixed = torch.is_autocast_enabled(weight.device.type)  # autocast converts between dtypes by itself
    for name, tensor in (("state", state), ("prompt", prompt), ("noise", noise)):
        if tensor is None:
            continue
        fits = tensor.dtype == weight.dtype or (mixed and tensor.is_floating_point())
        if not fits or tensor.device != weight.device or tensor.layout != torch.strided:
            found, expected = (f"{t.dtype} on {t.device}, {t.layout}" for t in (tensor, weight))
            raise InputError("wrong kind of tensor", field=name, found=found, expected=f"{expected}, as the net")
    if noise is not None:
        if seed is not None:
            raise InputError("seed and noise exclude each other", field="seed", found=seed, expected="None with noise")
        full = (plan.steps + 1, batch, samples, net.action_dim)
        allowed = {full} if samples > 1 else {full, (plan.steps + 1, batch, net.action_dim)}
        if tuple(noise.shape) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise InputError("wrong shape", field="noise", found=tuple(noise.shape), expected=expected)
    check_seed(seed, batch)
