"""`reverse_diffusion`: one operation, its backends and how one is chosen."""

from __future__ import annotations

import logging
from functools import cache, lru_cache
from typing import Literal, SupportsIndex, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from llmdpd.diffusion.noise_mlp import NoiseMLP
from llmdpd.diffusion.reference import reverse_diffusion_reference
from llmdpd.diffusion.schedules import Precision, SamplerPlan
from llmdpd.errors import InputError
from llmdpd.ops import autograd, native, operators, packed
from llmdpd.ops.compiling import constant_when_compiled
from llmdpd.ops.philox import philox_normal, signed64

Backend = Literal["auto", "reference", "cpp", "triton"]

_log = logging.getLogger(__name__)


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
        backend: `reference` (PyTorch, any device and dtype), `cpp` (CPU, float32 tensors), `triton` (CUDA, float32
            tensors); `auto` takes the fastest that can run and logs once why another could not.
        precision: `bf16` runs the matrix products of the hidden layers in bfloat16, summed in float32.

    Returns:
        [B, A], or [B, N, A] where samples > 1; differentiable in net, state and prompt.

    Raises:
        InputError: shapes or dtypes that do not fit together, or an unknown backend or precision.
        BackendUnavailableError: a backend asked for by name that cannot run.
    """
    compiling = torch.compiler.is_compiling()
    if (
        not compiling
        and noise is None
        and (seed is None or type(seed) is int)
        and backend in ("auto", "cpp")
        and precision in ("fp32", "bf16")
    ):
        drawn = packed.quick_sample(net, plan, state, prompt, samples, seed, precision == "bf16")
        if drawn is not None:
            return drawn
    _check(net, state, prompt, plan, samples, seed, noise, backend, precision)
    chosen = _choose(net, state, prompt, noise, backend, precision)
    needs_grad = torch.is_grad_enabled() and (
        state.requires_grad or prompt.requires_grad or any(t.requires_grad for t in net.parameters())
    )
    if chosen == "cpp" and not needs_grad and not compiling:
        if seed is None and noise is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
        return packed.sample(
            net,
            plan,
            state,
            prompt,
            samples=samples,
            seed=seed if seed is None or isinstance(seed, Tensor) else int(seed),  # numpy's integers too
            noise=noise,
            bf16=precision == "bf16",
            threads=native.threads(),
        )
    key = None if noise is not None else _key(seed, state.device)
    if chosen == "reference":
        actions = _by_reference(net, state, prompt, plan, samples, key, noise, precision)
    else:
        actions = _by_operator(net, state, prompt, plan, samples, key, noise, precision == "bf16", needs_grad)
    return actions if samples > 1 else actions[:, 0]


def _key(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The noise's key, int64 [1] or [B], on the device; drawn there where none is given: nobody waits for it."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device)
    return torch.full((1,), signed64(seed), dtype=torch.int64, device=device)  # filled there: no copy to wait for


def _by_reference(
    net: NoiseMLP,
    state: Tensor,
    prompt: Tensor,
    plan: SamplerPlan,
    samples: int,
    key: Tensor | None,
    noise: Tensor | None,
    precision: str,
) -> Tensor:
    batch = state.shape[0]
    if noise is not None:
        draws = noise.reshape(plan.steps + 1, batch, samples, net.action_dim)
    else:
        assert key is not None
        seed = key if key.shape[0] == batch and batch != 1 else int(key)
        draws = philox_normal(seed, batch, samples, plan.steps + 1, net.action_dim, state.device).to(state.dtype)
    return reverse_diffusion_reference(net, state, prompt, plan, draws, precision)


def _by_operator(
    net: NoiseMLP,
    state: Tensor,
    prompt: Tensor,
    plan: SamplerPlan,
    samples: int,
    key: Tensor | None,
    noise: Tensor | None,
    bf16: bool,
    needs_grad: bool,
) -> Tensor:
    """Through the registered operator: what does not depend on the step is computed in torch, W_s s aside."""
    timesteps, table = _plan_tensors(plan, state.device)
    with torch.autocast(state.device.type, enabled=False):
        action_weight, _, state_weight, prompt_weight, bias = net.first_layer()
        init = F.linear(prompt, prompt_weight, bias)
        time_rows = net.time_rows(timesteps)
    trunk = [part for layer in net.linears[1:] for part in (layer.weight, layer.bias)]
    if key is None:
        key = timesteps.new_zeros(1)
    keep = needs_grad
    if keep and not state.is_cuda:
        rows, (hidden, actions) = state.shape[0] * samples, action_weight.shape
        keep = operators.keeps_tape(operators.tape_floats(rows, hidden, actions, actions, samples, plan.steps, bf16))
    given = None if noise is None else noise.reshape(plan.steps + 1, state.shape[0], samples, net.action_dim)
    constants = (table, key, given, plan.start, operators.bound(plan.clip), samples, bf16)
    return autograd.chain(state, state_weight, init, time_rows, action_weight, trunk, constants, keep)


@constant_when_compiled
def _plan_tensors(plan: SamplerPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """The plan's time indices int64 [K] and its table float32 [K, 6] on a device."""
    return _kept_plan_tensors(plan, device)


@cache  # a captured CUDA graph may read them as long as the process lives
def _kept_plan_tensors(plan: SamplerPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    # Plain tensors, whatever mode the first caller was in: they serve all.
    with torch.inference_mode(False), _disable_current_modes():
        timesteps = torch.tensor(plan.timesteps, device=device)
        return timesteps, torch.from_numpy(packed.coefficients(plan)).to(device)


def _choose(net: NoiseMLP, state: Tensor, prompt: Tensor, noise: Tensor | None, backend: str, precision: str) -> str:
    """The backend to run: the one asked for, or for `auto` the fastest that can."""
    if backend == "reference":
        return backend
    name = backend if backend != "auto" else "triton" if state.is_cuda else "cpp"
    obstacle = _obstacle(name, net, state, prompt, noise)
    if obstacle is None:
        return name
    obstacle = f"the {name} backend cannot run: {obstacle}"
    if backend != "auto":
        raise BackendUnavailableError(obstacle)
    _log_once(obstacle)
    return "reference"


def _obstacle(name: str, net: NoiseMLP, state: Tensor, prompt: Tensor, noise: Tensor | None) -> str | None:
    """Why a backend cannot run here, on these tensors; None where it can."""
    missing = native.available()[1] if name == "cpp" else triton_obstacle()
    if missing is not None:
        return missing
    device = "cpu" if name == "cpp" else "cuda"
    if state.device.type != device:
        return f"tensors are on {state.device}, and it runs on {device}: move them there or use another backend"
    if {state.dtype, prompt.dtype, net.layers[0].weight.dtype} != {torch.float32}:
        return "it takes float32 alone: use float32 tensors, or backend='reference'"
    if noise is not None and noise.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for given noise: use backend='reference'"
    return None


@constant_when_compiled
def triton_obstacle() -> str | None:
    """Why the Triton kernels cannot run here; None where they can."""
    return _kept_triton_obstacle()


@lru_cache(maxsize=1)  # looking a package's version up costs several times a small batch's whole chain
def _kept_triton_obstacle() -> str | None:
    try:
        from llmdpd import kernels
    except ImportError:
        return "llmdpd.kernels is not here, llmdpd was never installed (pip install .)"
    available, reason = kernels.availability()
    if available and kernels.interpreted():
        return "TRITON_INTERPRET is set, which is for the kernels' own tests"
    return None if available else reason


@lru_cache(maxsize=64)
def _log_once(obstacle: str) -> None:
    _log.info("reverse_diffusion runs on the reference backend: %s", obstacle)


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
    if not 1 <= samples <= native.MAX_SAMPLES:
        raise InputError("wrong number of actions a state", field="samples", found=samples, expected="1 to 2^31 - 1")
    if state.ndim != 2 or state.shape[1] != net.state_dim:
        raise InputError("wrong shape", field="state", found=tuple(state.shape), expected=f"[B, {net.state_dim}]")
    batch = state.shape[0]
    if batch * samples > native.MAX_ROWS:
        most = f"{native.MAX_ROWS} at most"
        raise InputError("too many actions for one call", field="samples", found=batch * samples, expected=most)
    if tuple(prompt.shape) not in {(net.prompt_dim,), (batch, net.prompt_dim)}:
        expected = f"[{net.prompt_dim}] or [{batch}, {net.prompt_dim}]"
        raise InputError("wrong shape", field="prompt", found=tuple(prompt.shape), expected=expected)
    weight = next(net.parameters())
    mixed = torch.is_autocast_enabled(weight.device.type)  # autocast brings dtypes together by itself
    for name, tensor in (("state", state), ("prompt", prompt), ("noise", noise)):
        if tensor is None:
            continue
        fits = tensor.dtype == weight.dtype or (mixed and tensor.is_floating_point())
        if not fits or tensor.device != weight.device or tensor.layout != torch.strided:
            found, expected = (f"{t.dtype} on {t.device}, {t.layout}" for t in (tensor, weight))
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
