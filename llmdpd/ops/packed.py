"""Sampling on the CPU without gradients: networks packed once for as long as their weights stay what they are.

Packing half a megabyte of weights costs more than an action. A packed network is used again exactly as long as every
parameter is the same object, in the same memory, at the same version (the counter that autograd keeps of in-place
changes: optimisers, `load_state_dict`, `copy_`, `lerp_`). Writes through `.data` escape that counter, so a sample of
the weights (every 256th number) is compared as well: a copy or an average through `.data` is seen, a write to one
single element through `.data` may not be. Inference tensors and parametrised layers have no versions: those networks
are packed at every call.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.ops import native

if TYPE_CHECKING:
    from llmdpd.diffusion.noise_mlp import NoiseMLP
    from llmdpd.diffusion.schedules import SamplerPlan

_MASK64 = (1 << 64) - 1
_MAX_PLANS = 32  # bound to one network at a time


class _Watch:
    """Sees whether a module's weights are still what they were when this was made."""

    def __init__(self, module: nn.Module, layers: Sequence[nn.Linear]) -> None:
        self.parameters = list(module.parameters())
        # Keeps the memory from being given to another tensor: the same address is then the same memory.
        self._alive = [tensor.detach() for tensor in (*self.parameters, *module.buffers())]
        self._native = native.module()
        self._isa = self._native.active_isa()
        self._watched = _watched(module, layers)

    @property
    def lasting(self) -> bool:
        """Whether a change can be seen; if not, what was made of the weights must not be kept."""
        return self._watched is not None

    def unchanged(self) -> bool:
        return (
            self._watched is not None
            and self._native.active_isa() == self._isa
            and self._native.all_unchanged(self._watched)
        )


def _watched(module: nn.Module, layers: Sequence[nn.Linear]) -> tuple[tuple[Any, ...], ...] | None:
    """What must not change, for `_native.all_unchanged`; None where a change of the weights would not be seen.

    Tuples (dict, name, module), and (dict, name, tensor, version, pointer) for parameters and buffers.
    """
    watched: list[tuple[Any, ...]] = []
    for part in module.modules():
        watched += [(part._modules, name, child) for name, child in part._modules.items()]
        for name, parameter in part._parameters.items():
            if parameter is None or parameter.is_inference():
                return None
            if not (parameter.is_contiguous() and native.aligned(parameter)):
                return None  # a copy of it was packed, which is gone by now: it can't be compared with
            watched.append((part._parameters, name, parameter, parameter._version, parameter.data_ptr()))
        for name, buffer in part._buffers.items():
            if buffer is None or buffer.is_inference():
                return None
            watched.append((part._buffers, name, buffer, buffer._version, buffer.data_ptr()))
    # Two a linear layer; one that computes its weight from other parameters has others.
    plain = {id(part) for layer in layers for part in (layer.weight, layer.bias)}
    found = {id(item[2]) for item in watched if isinstance(item[2], nn.Parameter)}
    return tuple(watched) if found == plain else None


class PackedNet:
    """A noise network's weights in the C++ code's layout, and the plans that were bound to them."""

    def __init__(self, net: NoiseMLP, bf16: bool) -> None:
        first, *rest = net.linears
        self.watch = _Watch(net, [*net.linears, *(part for part in net.time_mlp if isinstance(part, nn.Linear))])
        self._time_mlp = net.time_mlp  # not the network itself, which must be free to go
        weight, bias = native.array(first.weight, "layers[0].weight"), native.array(first.bias, "layers[0].bias")
        self._packed = native.module().PackedNet(
            net.action_dim, net.time_dim, weight, bias, _trunk_arrays(rest), net.state_dim, bf16
        )
        self._samplers: dict[SamplerPlan, Any] = {}

    def is_current(self) -> bool:
        """Whether the network still has the weights that were packed."""
        return self.watch.unchanged() and bool(self._packed.unchanged())

    def learns(self) -> bool:
        """Whether a parameter asks for a gradient."""
        return any(parameter.requires_grad for parameter in self.watch.parameters)

    def sampler(self, plan: SamplerPlan) -> Any:
        """The plan bound to these weights: its time rows are computed."""
        sampler = self._samplers.get(plan)
        if sampler is None:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                embedding = self._time_mlp(torch.tensor(plan.timesteps, device="cpu"))
            clip = math.inf if plan.clip is None else plan.clip
            sampler = native.module().Sampler(
                self._packed, coefficients(plan), native.array(embedding, "time embedding"), plan.start, clip
            )
            if len(self._samplers) >= _MAX_PLANS:
                self._samplers.clear()
            self._samplers[plan] = sampler
        return sampler


class PackedCritic:
    """A critic's weights in the C++ code's layout."""

    def __init__(self, network: nn.Module, state_dim: int, action_dim: int, bf16: bool) -> None:
        first, *rest = layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        self.watch = _Watch(network, layers)
        self.packed = native.module().PackedCritic(
            state_dim, action_dim, native.array(first.weight), native.array(first.bias), _trunk_arrays(rest), bf16
        )

    def is_current(self) -> bool:
        """Whether the critic still has the weights that were packed."""
        return self.watch.unchanged() and bool(self.packed.unchanged())


def _trunk_arrays(layers: Sequence[nn.Linear]) -> list[np.ndarray]:
    return [
        native.array(tensor, f"layers[{i}].{part}")
        for i, layer in enumerate(layers, start=1)
        for part, tensor in (("weight", layer.weight), ("bias", layer.bias))
    ]


def coefficients(plan: SamplerPlan) -> np.ndarray:
    """The plan's table as the kernels take it: float32 [K, 6], columns p, e, A, B, C, S."""
    return np.stack([plan.p, plan.e, plan.A, plan.B, plan.C, plan.S], axis=1).astype(np.float32)


Kept = tuple[weakref.WeakKeyDictionary[nn.Module, Any], weakref.WeakKeyDictionary[nn.Module, Any]]
_nets: Kept = (weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary())
_critics: Kept = (weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary())


def packed(net: NoiseMLP, bf16: bool) -> PackedNet:
    """The network packed, from an earlier call where its weights have not changed since."""
    entry: PackedNet | None = _nets[bf16].get(net)
    if entry is None or not entry.is_current():
        entry = PackedNet(net, bf16)
        _keep(_nets[bf16], net, entry)
    return entry


def packed_critic(network: nn.Module, state_dim: int, action_dim: int, bf16: bool) -> PackedCritic:
    """The critic packed, from an earlier call where its weights have not changed since."""
    entry: PackedCritic | None = _critics[bf16].get(network)
    if entry is None or not entry.is_current():
        entry = PackedCritic(network, state_dim, action_dim, bf16)
        _keep(_critics[bf16], network, entry)
    return entry


def _keep(kept: weakref.WeakKeyDictionary[nn.Module, Any], module: nn.Module, entry: PackedNet | PackedCritic) -> None:
    if entry.watch.lasting:
        kept[module] = entry
    else:
        kept.pop(module, None)


def quick_sample(
    net: NoiseMLP, plan: SamplerPlan, state: Tensor, prompt: Tensor, samples: int, seed: int | None, bf16: bool
) -> Tensor | None:
    """`sample` for the most frequent call, with nothing but the checks that it needs; None where it is another one.

    That is: a network that was packed before and has not changed, no gradient, dense float32 tensors on the CPU, one
    prompt for all. A call for one state takes 15 microseconds in C++, as much as careful checks in Python do.
    """
    entry: PackedNet | None = _nets[bf16].get(net)
    if (
        entry is None
        or type(state) is not Tensor
        or type(prompt) is not Tensor
        or state.dtype is not torch.float32
        or prompt.dtype is not torch.float32
        or not (state.layout is torch.strided is prompt.layout and state.is_cpu and prompt.is_cpu)
        or not (state.is_contiguous() and prompt.is_contiguous())
        or not (native.aligned(state) and native.aligned(prompt))
        or type(samples) is not int
        or (torch.is_grad_enabled() and (state.requires_grad or prompt.requires_grad or entry.learns()))
        or not entry.is_current()
    ):
        return None
    shape = state.shape
    if len(shape) != 2 or shape[1] != net.state_dim or prompt.shape != (net.prompt_dim,) or samples < 1:
        return None
    rows = shape[0] * samples
    if rows > native.MAX_ROWS or samples > native.MAX_SAMPLES:
        return None
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    actions = np.empty((rows, net.action_dim), dtype=np.float32)
    keys = np.array([seed & _MASK64], dtype=np.uint64)
    states, prompts = state.detach().numpy(), prompt.detach().numpy()
    entry.sampler(plan).run(states, prompts, samples, keys, None, actions, native.threads())
    drawn = torch.from_numpy(actions)
    return drawn if samples == 1 else drawn.view(shape[0], samples, net.action_dim)


def sample(
    net: NoiseMLP,
    plan: SamplerPlan,
    state: Tensor,
    prompt: Tensor,
    *,
    samples: int = 1,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    bf16: bool = False,
    threads: int = 1,
) -> Tensor:
    """Draw actions a_0 by the reverse chain (paper, equation 4) in C++, without gradient.

    Args:
        net: the noise network, float32 on the CPU.
        plan: the sampler's table.
        state: float32 [B, S], B from 0.
        prompt: float32 [Z] (one task) or [B, Z].
        samples: N actions a state.
        seed: key of the counter-based noise, with row = state * N + sample; or int64 [B], a key for each state, with
            row = sample.
        noise: instead of a seed, float32 [K + 1, B, A] (where N is 1) or [K + 1, B, N, A].
        bf16: the trunk's matrix products in bfloat16.
        threads: how many threads may work. The result does not depend on it.

    Returns:
        float32 [B, A] where N is 1, else [B, N, A].

    Raises:
        InputError: a shape, dtype or device that does not fit.
        RuntimeError: the C++ module is not there.
    """
    batch = check_inputs(net, state, prompt, samples, threads)
    draws = None if noise is None else _noise(noise, plan.steps, batch, samples, net.action_dim)
    keys = np.zeros(1, dtype=np.uint64) if noise is not None else noise_keys(seed, batch)
    states, prompts = native.array(state, "state"), native.array(prompt, "prompt")
    actions = np.empty((batch * samples, net.action_dim), dtype=np.float32)
    packed(net, bf16).sampler(plan).run(states, prompts, samples, keys, draws, actions, threads)
    result = torch.from_numpy(actions)
    return result if samples == 1 else result.view(batch, samples, net.action_dim)


def _require_shape(tensor: Tensor, name: str, *allowed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in allowed:
        expected = " or ".join(str(list(shape)) for shape in allowed)
        raise InputError("wrong shape", field=name, found=list(tensor.shape), expected=expected)


def check_inputs(net: NoiseMLP, state: Tensor, prompt: Tensor, samples: int, threads: int = 1) -> int:
    """Raise `InputError` for what does not fit the net; the batch size where all fits."""
    if not 1 <= samples <= native.MAX_SAMPLES:
        raise InputError("wrong number of actions a state", field="samples", found=samples, expected="1 to 2^31 - 1")
    if threads < 1:
        raise InputError("at least one thread", field="threads", found=threads, expected="1 or more")
    if state.ndim != 2:
        raise InputError("wrong shape", field="state", found=list(state.shape), expected=f"[B, {net.state_dim}]")
    batch = state.shape[0]
    _require_shape(state, "state", (batch, net.state_dim))
    _require_shape(prompt, "prompt", (net.prompt_dim,), (batch, net.prompt_dim))
    if batch * samples > native.MAX_ROWS:
        found, expected = batch * samples, f"<= {native.MAX_ROWS}"
        raise InputError("too many rows for one call", field="state", found=found, expected=expected)
    return batch


def _noise(noise: Tensor, steps: int, batch: int, samples: int, action_dim: int) -> np.ndarray:
    """Given noise as [K + 1, B * N, A]."""
    full = (steps + 1, batch, samples, action_dim)
    short = (steps + 1, batch, action_dim)
    _require_shape(noise, "noise", *((short, full) if samples == 1 else (full,)))
    return native.array(noise, "noise").reshape(steps + 1, batch * samples, action_dim)


def noise_keys(seed: int | Tensor | None, batch: int) -> np.ndarray:
    """Noise keys, uint64: [1] for one seed, [B] for a seed a state."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.device.type != "cpu":
            found = f"{seed.dtype} on {seed.device}"
            raise InputError("wrong kind of seeds", field="seed", found=found, expected="an int, or int64 on the CPU")
        _require_shape(seed, "seed", (batch,))
        return native.keys(seed)
    if seed is None:
        raise InputError("the sampler needs a seed or noise", field="seed", found=None, expected="an int or int64 [B]")
    return np.array([seed & _MASK64], dtype=np.uint64)
