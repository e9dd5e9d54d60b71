"""Sampling on the CPU without gradients, with networks packed once for as long as their weights last.

Packing half a megabyte of weights costs more than an action. A packed network is used again exactly as long as every
parameter and buffer is the same object, in the same memory, and has the same bytes: all of them are compared with a
copy at each call, which takes as long as the shortest call. No counter of changes could replace that: writes through
`.data`, NumPy or shared memory escape the one that autograd keeps. Parametrised layers compute their weights anew:
those networks are packed at every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.ops import native
from llmdpd.ops.arguments import MAX_ROWS, MAX_SAMPLES, NoiseNetwork, SamplerCoefficients
from llmdpd.ops.packing import bind_sampler, pack_net
from llmdpd.ops.unchanged import places

_MASK64 = (1 << 64) - 1
_MAX_SAMPLERS = 32  # bound to one network at a time


class _Watch:
    """Sees whether a module's weights are still what they were when this was made."""

    def __init__(self, module: nn.Module, layers: Sequence[nn.Linear]) -> None:
        self.parameters = list(module.parameters())
        self._native = native.module()
        self._isa = self._native.active_isa()
        self._watched = watched(module, layers, _lies_in_place)
        if self._watched is not None:
            # Keeps the memory from being given to another tensor as well: the same address is then the same memory.
            tensors = (*self.parameters, *module.buffers())
            self._snapshot = self._native.Snapshot([tensor.detach().numpy() for tensor in tensors])

    @property
    def lasting(self) -> bool:
        """Whether a change can be seen; if not, what was made of the weights must not be kept."""
        return self._watched is not None

    def unchanged(self) -> bool:
        return (
            self._watched is not None
            and self._native.active_isa() == self._isa
            and self._native.all_in_place(self._watched)
            and self._snapshot.unchanged()
        )


def _lies_in_place(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and native.aligned(tensor)


def watched(
    module: nn.Module, layers: Sequence[nn.Linear], seen: Callable[[Tensor], bool]
) -> tuple[tuple[Any, ...], ...] | None:
    """The `places` of a module that computes by these layers alone; None where a change would not be seen."""
    found = places(module, seen)
    kept = [tensors for part in module.modules() for tensors in (part._parameters, part._buffers)]
    if found is None or any(tensor is None for tensors in kept for tensor in tensors.values()):
        return None
    # Two a linear layer; one that computes its weight from other parameters has others.
    plain = {id(part) for layer in layers for part in (layer.weight, layer.bias)}
    parameters = {id(item[2]) for item in found if isinstance(item[2], nn.Parameter)}
    return tuple(found) if parameters == plain else None


class PackedNet:
    """A noise network packed, and the samplers that were bound to it."""

    def __init__(self, net: NoiseNetwork, bf16: bool) -> None:
        layers = [*net.linears, *(part for part in net.time_mlp if isinstance(part, nn.Linear))]
        self.watch = _Watch(cast("nn.Module", net), layers)
        self.action_dim = net.action_dim
        self._time_mlp = net.time_mlp  # not the network itself, which must be free to go
        self.packed = pack_net(net, bf16)
        self._samplers: dict[SamplerCoefficients, Any] = {}

    def is_current(self) -> bool:
        """Whether the network still has the weights that were packed."""
        return self.watch.unchanged()

    def learns(self) -> bool:
        """Whether a parameter asks for a gradient."""
        return any(parameter.requires_grad for parameter in self.watch.parameters)

    def sampler(self, coefficients: SamplerCoefficients) -> Any:
        """The coefficients bound to these weights."""
        sampler = self._samplers.get(coefficients)
        if sampler is None:
            sampler = bind_sampler(self.packed, self._time_mlp, coefficients)
            if len(self._samplers) >= _MAX_SAMPLERS:
                self._samplers.clear()
            self._samplers[coefficients] = sampler
        return sampler

    def run(
        self,
        coefficients: SamplerCoefficients,
        states: NDArray[np.float32],
        prompts: NDArray[np.float32],
        samples: int,
        keys: NDArray[np.uint64],
        noise: NDArray[np.float32] | None,
    ) -> Tensor:
        """a_0 [B, A] where samples is 1, else [B, N, A], of states [B, S] and prompts [Z] or [B, Z]."""
        actions = np.empty((len(states) * samples, self.action_dim), dtype=np.float32)
        self.sampler(coefficients).run(states, prompts, samples, keys, noise, actions, native.threads())
        result = torch.from_numpy(actions)
        return result if samples == 1 else result.view(len(states), samples, self.action_dim)


_Kept = weakref.WeakKeyDictionary[Any, PackedNet]
_nets: tuple[_Kept, _Kept] = (weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary())  # fp32, bf16


def packed(net: NoiseNetwork, bf16: bool) -> PackedNet:
    """The network packed, by an earlier call where its weights have not changed since."""
    kept = _nets[bf16]
    entry = kept.get(net)
    if entry is not None and entry.is_current():
        return entry
    entry = PackedNet(net, bf16)
    if entry.watch.lasting:
        kept[net] = entry
    else:
        kept.pop(net, None)
    return entry


def sample(
    net: NoiseNetwork,
    coefficients: SamplerCoefficients,
    state: Tensor,
    prompt: Tensor,
    samples: int,
    seed: int | Tensor | None,
    noise: Tensor | None,
    bf16: bool,
) -> Tensor:
    """a_0 by the reverse chain in C++, of arguments that were checked. Seed: an int, or int64 [B]."""
    if noise is None:
        keys, given = _keys(_random_seed() if seed is None else seed), None
    else:
        keys = np.zeros(1, dtype=np.uint64)
        given = native.array(noise, "noise").reshape(coefficients.steps + 1, -1, net.action_dim)
    states, prompts = native.array(state, "state"), native.array(prompt, "prompt")
    return packed(net, bf16).run(coefficients, states, prompts, samples, keys, given)


def sample_again(
    net: NoiseNetwork,
    coefficients: SamplerCoefficients,
    state: Tensor,
    prompt: Tensor,
    samples: int,
    seed: int | None,
    bf16: bool,
) -> Tensor | None:
    """`sample` for the most frequent call, with only the checks that it needs; None where it is another one.

    That is: a network that was packed before and has not changed, no gradient, dense float32 tensors on the CPU, one
    prompt for all. A call for one state takes 15 microseconds in C++, as much as careful checks take in Python.
    """
    entry: PackedNet | None = _nets[bf16].get(net)
    if (
        entry is None
        or not (_in_place(state) and _in_place(prompt))
        or type(samples) is not int
        or (torch.is_grad_enabled() and (state.requires_grad or prompt.requires_grad or entry.learns()))
        or not entry.is_current()
    ):
        return None
    shape = state.shape
    if len(shape) != 2 or shape[1] != net.state_dim or prompt.shape != (net.prompt_dim,):
        return None
    if not 1 <= samples <= MAX_SAMPLES or shape[0] * samples > MAX_ROWS:
        return None
    keys = _keys(_random_seed() if seed is None else seed)
    return entry.run(coefficients, state.detach().numpy(), prompt.detach().numpy(), samples, keys, None)


def _in_place(tensor: Tensor) -> bool:
    """Whether the C++ code can read the tensor where it is."""
    return (
        type(tensor) is Tensor
        and tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and tensor.is_contiguous()
        and native.aligned(tensor)
    )


def _random_seed() -> int:
    """From torch's global generator, which `torch.manual_seed` governs."""
    return int(torch.randint(2**63 - 1, ()))


def _keys(seed: int | Tensor) -> NDArray[np.uint64]:
    """Noise keys: [1] for one seed, [B] for a seed of each state."""
    if isinstance(seed, Tensor):
        return native.keys(seed)
    return np.array([int(seed) & _MASK64], dtype=np.uint64)  # int(): numpy's integers too
