"""Sampling on a CUDA device without gradients: one launch a call, and little else that the host does.

A network's weights are packed on the device once, and used again as long as every parameter and buffer is the same
object, in the same memory, and of the same version, autograd's counter of writes. (Comparing bytes, as on the CPU,
would take longer than the chain.) Writes that the counter does not see, through `.data` or by a replay of a CUDA graph
that was captured by hand, must be told: `torch.autograd.graph.increment_version`. In a capture nothing here is used,
but by `weights_of_a_graph`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llmdpd.ops.arguments import MAX_ROWS, MAX_SAMPLES, ChainArguments, NoiseNetwork, SamplerCoefficients
from llmdpd.ops.inference import watched
from llmdpd.ops.philox import signed64
from llmdpd.ops.triton import on_device
from llmdpd.ops.unchanged import Unwritten, has_version

if TYPE_CHECKING:
    from llmdpd.kernels.driver import Place

_MAX_KEPT = 32  # prompts, plans and calls of one network at a time
_WORKSPACE_BYTES = 32 << 20  # at most, kept for a stream; a call that needs more allocates it
_LARGE = 1 << 20  # numbers of a prompt that is not kept
_on_device: ContextVar[bool] = ContextVar("keys drawn on the device", default=False)
_of_a_graph: ContextVar[list[Any] | None] = ContextVar("what a graph reads", default=None)


@contextlib.contextmanager
def keys_on_device() -> Iterator[None]:
    """While the block runs, keys of the noise are drawn on the device, as a captured CUDA graph draws its own.

    So iterations before a capture take the same noise as those after it. It costs a launch a call.
    """
    before = _on_device.set(True)
    try:
        yield
    finally:
        _on_device.reset(before)


@contextlib.contextmanager
def weights_of_a_graph() -> Iterator[list[Any]]:
    """While the block captures a CUDA graph, networks are sampled by the weights that were packed before it.

    Yields a list of what the graph reads beside its own: whoever replays it keeps that, and drops both where weights
    change. Each kind of call must have been made before, outside of the capture.
    """
    held: list[Any] = []
    before = _of_a_graph.set(held)
    try:
        yield held
    finally:
        _of_a_graph.reset(before)


class _Call(NamedTuple):
    """A kind of call that was made before: the loaded kernel, and its arguments, of which some are each call's own."""

    kernel: Any
    programs: int
    values: list[Any]
    own: dict[str, int]
    """Places in `values` of states, u_z, key or seed, actions, contexts and scratch."""
    floats: tuple[int, int]
    """Of contexts and scratch."""
    held: tuple[Tensor, Tensor]
    """Time rows and table, of which `values` has the addresses, and which nobody else may keep."""


class ResidentNet:
    """A noise network packed on its device, and what was made of it there, for the stream that is current when it is.

    What was made is not ordered among streams: on another one the network is packed again.
    """

    def __init__(self, net: NoiseNetwork, bf16: bool) -> None:
        from llmdpd.kernels import reverse_diffusion as kernel

        layers = [*net.linears, *(part for part in net.time_mlp if isinstance(part, nn.Linear))]
        module = cast("nn.Module", net)
        self.watch = Unwritten([module], watched(module, layers, has_version))
        self.device = net.linears[0].weight.device
        first, *rest = net.linears
        sizes = [net.action_dim, net.time_dim, net.state_dim, net.prompt_dim]
        W_a, W_t, W_s, self._W_z = first.weight.detach().split(sizes, dim=1)
        self._W_t, self._b1, self._time_mlp = W_t, first.bias.detach(), net.time_mlp
        trunk = [part.detach().contiguous() for layer in rest for part in (layer.weight, layer.bias)]
        nothing = W_s.new_empty(0)
        # State, prompt, times, key and plan are each call's.
        self._chain = ChainArguments(
            nothing, W_s, nothing, nothing, W_a, trunk, nothing, nothing, None, 0.0, 0.0, 1, bf16
        )
        self._packed = kernel.pack(self._chain)
        self._packed.launch.run()
        self._times: dict[SamplerCoefficients, tuple[Tensor, Tensor]] = {}
        self._prompts: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._calls: dict[Any, _Call] = {}

    def is_current(self) -> bool:
        """Whether the network still has the weights that were packed."""
        return self.watch.unchanged()

    def learns(self) -> bool:
        """Whether a parameter asks for a gradient."""
        return any(parameter.requires_grad for parameter in self.watch.parameters)

    def run(
        self,
        place: Place,
        plan: SamplerCoefficients,
        state: Tensor,
        prompt: Tensor,
        samples: int,
        seed: int | Tensor | None,
    ) -> Tensor:
        """a_0 [B, A] where samples is 1, else [B, N, A]; the arguments fit and lie on the device."""
        from llmdpd import kernels

        batch, action_dim = state.shape[0], self._chain.W_a.shape[1]
        shape = (batch, action_dim) if samples == 1 else (batch, samples, action_dim)
        actions = torch.empty(shape, dtype=torch.float32, device=self.device)
        if not batch:
            return actions
        key = _drawn_key(place, self.device) if seed is None else seed
        u_z = self._prompt_part(prompt)
        given = isinstance(key, Tensor) and len(key)
        kind = (plan, batch, samples, u_z.ndim, given, place.device, kernels.fp32_products())
        call = self._calls.get(kind)
        if call is None:
            _refuse_in_a_graph("a call of another kind than before")
            call = self._prepared(plan, state, u_z, samples, key, actions, place)
            _keep(self._calls, kind, call)
        values, own = list(call.values), call.own
        if (held := _of_a_graph.get()) is not None:
            held += [self, call]
        contexts, scratch = _workspace(place, self.device, call.floats)
        values[own["states"]], values[own["u_z"]] = state.data_ptr(), u_z.data_ptr()
        values[own["actions"]], values[own["contexts"]] = actions.data_ptr(), contexts.data_ptr()
        values[own["scratch"]] = scratch.data_ptr()
        if isinstance(key, Tensor):
            values[own["key"]] = key.data_ptr()
        else:
            values[own["seed"]] = signed64(key)
        call.kernel.launch(call.programs, 1, place.stream, tuple(values))
        return actions

    def _prepared(
        self,
        plan: SamplerCoefficients,
        state: Tensor,
        u_z: Tensor,
        samples: int,
        key: int | Tensor,
        actions: Tensor,
        place: Place,
    ) -> _Call:
        from llmdpd.kernels import reverse_diffusion as kernel

        tau, table = self._time_part(plan)
        chain = self._chain._replace(
            state=state, u_z=u_z, tau=tau, table=table, start=plan.start, clip=plan.bound, samples=samples,
            key=key if isinstance(key, Tensor) else self._chain.key,
        )  # fmt: skip
        by_value = None if isinstance(key, Tensor) else signed64(key)
        H, A = chain.W_a.shape
        floats = kernel.workspace_floats(len(state) * samples, H, A, chain.bf16, place.capability)
        work, empty = _workspace(place, self.device, floats), self._chain.state
        launch = kernel.forward_launch(self._packed, chain, actions, empty, by_value, work, place.capability)
        names = [name for name, value in launch.arguments.items() if value is not None]
        places = {name: place for place, name in enumerate(names)}
        return _Call(launch.loaded(place), launch.programs, list(launch.values()), places, floats, (tau, table))

    def _time_part(self, plan: SamplerCoefficients) -> tuple[Tensor, Tensor]:
        """The time rows [K, H] and the table [K, 6] of a plan."""
        found = self._times.get(plan)
        if found is None:
            with _exactly(self.device):
                timesteps = torch.tensor(plan.timesteps, device=self.device)
                tau = F.linear(self._time_mlp(timesteps), self._W_t).contiguous()
            found = tau, torch.from_numpy(plan.table()).to(self.device)
            _keep(self._times, plan, found)
        return found

    def _prompt_part(self, prompt: Tensor) -> Tensor:
        """W_z z + b1 of a prompt [Z] or [B, Z], which is held so long that its place is no other tensor's."""
        # An inference tensor has no version; what a graph computes is its own.
        if prompt.is_inference() or _of_a_graph.get() is not None:
            with _exactly(self.device):
                return F.linear(prompt, self._W_z, self._b1)
        found = self._prompts.get(id(prompt))
        if found is not None and found[0] is prompt and found[1] == prompt._version:
            return found[2]
        with _exactly(self.device):
            u_z = F.linear(prompt.detach(), self._W_z, self._b1)
        if prompt.grad_fn is None and prompt.numel() <= _LARGE:  # or else its graph, or gigabytes, would be held
            _keep(self._prompts, id(prompt), (prompt, prompt._version, u_z))
        return u_z


class _OfStreams(NamedTuple):
    """A network as it was packed for each stream, by the driver's handle."""

    device: torch.device
    nets: dict[int, ResidentNet]


_Kept = weakref.WeakKeyDictionary[Any, _OfStreams]
_nets: tuple[_Kept, _Kept] = (weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary())  # fp32, bf16
_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def eager(state: Tensor) -> bool:
    """Whether a launch of our own is possible: no capture, mode, compiler or subclass has a say in it."""
    from llmdpd.kernels import driver

    return (
        type(state) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and (_of_a_graph.get() is not None or not driver.capturing())
    )


def sample(
    net: NoiseNetwork,
    plan: SamplerCoefficients,
    state: Tensor,
    prompt: Tensor,
    samples: int,
    seed: int | Tensor | None,
    bf16: bool,
) -> Tensor:
    """a_0 of arguments that were checked, on their device. seed: an int, or int64 [B]."""
    from llmdpd.kernels import driver

    place = driver.place_of(state)
    kept = _nets[bf16].get(net)
    entry = None if kept is None else kept.nets.get(place.stream)
    if entry is None or not entry.is_current():
        _refuse_in_a_graph("weights that were not packed before")
        outdated, entry = entry is not None, ResidentNet(net, bf16)
        if not entry.watch.lasting:
            _nets[bf16].pop(net, None)
        elif kept is None or outdated or kept.device != entry.device:
            _nets[bf16][net] = _OfStreams(entry.device, {place.stream: entry})
        else:
            _keep(kept.nets, place.stream, entry)
    key = _ready(seed.to(entry.device)) if isinstance(seed, Tensor) else seed
    return entry.run(place, plan, _ready(state), _ready(prompt), samples, key)


def sample_again(
    net: NoiseNetwork,
    plan: SamplerCoefficients,
    state: Tensor,
    prompt: Tensor,
    samples: int,
    seed: int | Tensor | None,
    bf16: bool,
) -> Tensor | None:
    """`sample` for a network that was packed before, with only the checks that this needs; None for any other call."""
    from llmdpd.kernels import driver

    kept = _nets[bf16].get(net)
    if kept is None or type(samples) is not int or not 1 <= samples <= MAX_SAMPLES or not eager(state):
        return None
    if not (_in_place(state, kept.device, torch.float32) and _in_place(prompt, kept.device, torch.float32)):
        return None
    shape = state.shape
    if len(shape) != 2 or shape[1] != net.state_dim or shape[0] * samples > MAX_ROWS:
        return None
    if prompt.shape not in ((net.prompt_dim,), (shape[0], net.prompt_dim)):
        return None
    if isinstance(seed, Tensor):
        if seed.shape != shape[:1] or not _in_place(seed, kept.device, torch.int64):
            return None
    elif seed is not None and type(seed) is not int:
        return None
    place = driver.place_of(state)
    entry = kept.nets.get(place.stream)
    if entry is None:
        return None
    if torch.is_grad_enabled() and (state.requires_grad or prompt.requires_grad or entry.learns()):
        return None
    return entry.run(place, plan, state, prompt, samples, seed) if entry.is_current() else None


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    if len(kept) >= _MAX_KEPT:
        kept.pop(next(iter(kept)))  # the oldest
    kept[key] = value


def _in_place(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel can read the tensor where it is."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is dtype
        and tensor.device == device
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.data_ptr() % 16 == 0
    )


def _ready(tensor: Tensor) -> Tensor:
    """The same tensor where a kernel can read it in place, else a copy."""
    dense = tensor.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()


@contextlib.contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """Products in float32 without a gradient, and not as tensors of inference, which could not be used outside."""
    with torch.inference_mode(False), torch.no_grad(), on_device(device):
        yield


def _refuse_in_a_graph(what: str) -> None:
    """What is made in a capture would exist only once the graph is replayed, and others would read it before."""
    if _of_a_graph.get() is not None:
        raise RuntimeError(f"a CUDA graph was to be captured of {what}")


def _workspace(place: Place, device: torch.device, floats: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Room for the programs' own. It is the stream's: its launches run one after another; a graph has its own."""
    of_a_graph = _of_a_graph.get() is not None
    kept = None if of_a_graph else _workspaces.get((place.device, place.stream))
    if kept is not None and len(kept[0]) >= floats[0] and len(kept[1]) >= floats[1]:
        return kept
    made = torch.empty(floats[0], device=device), torch.empty(floats[1], device=device)
    if 4 * sum(floats) <= _WORKSPACE_BYTES and not of_a_graph:
        _workspaces[place.device, place.stream] = made
    return made


def _drawn_key(place: Place, device: torch.device) -> int | Tensor:
    """A key from the device's generator; outside of `keys_on_device` without work for the device."""
    if _on_device.get():
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    from llmdpd.kernels import driver

    generator = driver.generator(place.device)
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # as any draw on the device
    return _mixed(_mixed(generator.initial_seed()) ^ offset)


def _mixed(number: int) -> int:
    """A 64-bit number whose bits all depend on all of another's: SplitMix64 (Steele et al. 2014)."""
    z = (number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)
