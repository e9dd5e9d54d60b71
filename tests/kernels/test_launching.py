"""What the host does for a launch, by a stand-in for the CUDA driver that records and computes nothing.

Tensors lie on the CPU here; kernels are compiled ahead of time for sm_90.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from llmdpd import kernels

if kernels.interpreted():
    pytest.skip("interpreted kernels are not launched", allow_module_level=True)

from llmdpd.diffusion import NoiseMLP, sampler_coefficients
from llmdpd.kernels import driver, learners, reverse_diffusion
from llmdpd.kernels import mish_mlp as triton_kernels
from llmdpd.nn.critic import DoubleQ
from llmdpd.ops import resident, triton
from llmdpd.ops.arguments import ChainArguments
from llmdpd.ops.philox import signed64
from tests.kernels.stand_in import Operations, StandIn


@pytest.fixture
def net() -> NoiseMLP:
    return NoiseMLP(7, 3, 6, 64, 8).requires_grad_(False)


PLAN = sampler_coefficients("ddpm", steps=3)


def sample(net: NoiseMLP, state: Tensor, prompt: Tensor, seed: Any = 11, samples: int = 1, again: bool = False) -> Any:
    function = resident.sample_again if again else resident.sample
    return function(net, PLAN, state, prompt, samples, seed, False)


def packed(net: NoiseMLP) -> resident.ResidentNet:
    """For the one stream."""
    ((_, entry),) = resident._nets[0][net].nets.items()
    return entry


def test_a_call_is_one_launch_and_one_allocation(
    stand_in: StandIn, net: NoiseMLP, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, prompt = torch.randn(19, 7), torch.randn(6)
    sample(net, state, prompt)
    assert [name for name, *_ in stand_in.launches()] == ["pack_kernel", "forward_kernel"]
    monkeypatch.setattr(resident, "_get_current_dispatch_mode", lambda: None)  # the counter itself is one
    with Operations() as operations:
        actions = sample(net, state, prompt, seed=-3, again=True)
    assert operations.names == ["aten.empty.memory_format"]
    ((name, fields, values),) = stand_in.launches()
    assert (name, fields["stream"], fields["device"], fields["members"]) == ("forward_kernel", 77, 0, 1)
    assert (fields["programs"], fields["threads"]) == (2, 128)
    call = next(iter(packed(net)._calls.values()))
    named = dict(zip(call.own, values, strict=True))
    assert named["states"] == state.data_ptr()
    assert named["actions"] == actions.data_ptr()
    assert named["seed"] == (-3) & (2**64 - 1)
    assert (named["rows"] & 0xFFFFFFFF, named["steps"] & 0xFFFFFFFF) == (19, 3)
    assert named["b2"] == net.linears[1].bias.data_ptr()
    assert set(named) >= {"W_s", "u_z", "tau", "w2", "w3", "w4", "table", "contexts", "scratch"}


def test_the_kind_of_products_is_that_of_the_call(stand_in: StandIn, net: NoiseMLP) -> None:
    state, prompt, used = torch.randn(2, 7), torch.randn(6), []
    for how in ("tf32x3", "ieee", "tf32x3"):
        kernels.set_fp32_products(how)  # type: ignore[arg-type]
        try:
            sample(net, state, prompt)
        finally:
            kernels.set_fp32_products("tf32x3")
        used.append(stand_in.launches()[-1][1]["kernel"])
    assert used[0] == used[2] != used[1]


def test_weights_are_packed_once_a_version(stand_in: StandIn, net: NoiseMLP) -> None:
    state, prompt = torch.randn(2, 7), torch.randn(6)
    for _ in range(3):
        sample(net, state, prompt)
    assert [name for name, *_ in stand_in.launches()].count("pack_kernel") == 1
    with torch.no_grad():
        net.linears[1].weight.mul_(2.0)
    assert sample(net, state, prompt, again=True) is None
    sample(net, state, prompt)
    assert [name for name, *_ in stand_in.launches()] == ["pack_kernel", "forward_kernel"]
    net.linears[3].bias = torch.nn.Parameter(torch.zeros(3))
    assert sample(net, state, prompt, again=True) is None


def test_a_prompt_is_multiplied_once_a_version(stand_in: StandIn, net: NoiseMLP) -> None:
    state, prompt = torch.randn(2, 7), torch.randn(6)
    sample(net, state, prompt)
    entry = packed(net)
    first = entry._prompt_part(prompt)
    assert torch.equal(first, net.context(torch.zeros(1, 7), prompt)[0])
    assert entry._prompt_part(prompt) is first
    prompt.mul_(2.0)
    assert torch.equal(entry._prompt_part(prompt), net.context(torch.zeros(1, 7), prompt)[0])


@pytest.mark.parametrize("seed", [None, 3, "each"])
def test_keys(stand_in: StandIn, net: NoiseMLP, seed: Any) -> None:
    state, prompt = torch.randn(4, 7), torch.randn(4, 6)
    seeds = torch.arange(4) if seed == "each" else seed
    made = []
    for again in (False, True):
        sample(net, state, prompt, seeds, again=again)
        call = next(iter(packed(net)._calls.values()))
        made.append(dict(zip(call.own, stand_in.launches()[-1][2], strict=True)))
    if seed == "each":
        assert made[1]["key"] == seeds.data_ptr()
    elif seed is None:
        assert made[0]["seed"] != made[1]["seed"]  # the generator went on
    else:
        assert made[0]["seed"] == made[1]["seed"] == 3


def test_in_training_keys_are_drawn_on_the_device(stand_in: StandIn, net: NoiseMLP) -> None:
    with resident.keys_on_device():
        sample(net, torch.randn(4, 7), torch.randn(6), None)
    call = next(iter(packed(net)._calls.values()))
    assert "key" in call.own
    assert driver.generator(0).get_offset() == 8  # type: ignore[attr-defined]


def test_a_graph_keeps_what_it_reads_and_leaves_nothing(
    stand_in: StandIn, net: NoiseMLP, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, prompt, seeds = torch.randn(19, 7), torch.randn(6), torch.arange(19)
    sample(net, state, prompt, seeds)
    entry = packed(net)
    (call,) = entry._calls.values()
    kept, prompts = dict(resident._workspaces), dict(entry._prompts)
    stand_in.launches()
    monkeypatch.setattr(driver, "capturing", lambda: True)
    assert sample(net, state, prompt, seeds, again=True) is None, "weights may change from replay to replay"
    with resident.weights_of_a_graph() as held:
        other = torch.randn(6)
        assert sample(net, state, other, seeds, again=True) is not None
        ((name, _, values),) = stand_in.launches()
        named = dict(zip(call.own, values, strict=True))
        assert name == "forward_kernel"
        assert named["contexts"] not in [part.data_ptr() for parts in kept.values() for part in parts]
        assert (held[0], held[1]) == (entry, call)
        with pytest.raises(RuntimeError, match="another kind"):
            sample(net, state[:5], prompt, seeds[:5])
        with torch.no_grad():
            net.linears[1].weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="not packed"):
            sample(net, state, prompt, seeds)
    assert resident._workspaces == kept
    assert list(entry._prompts) == list(prompts)
    assert packed(net) is entry
    assert stand_in.launches() == []


def test_another_kind_of_call_is_left_to_the_careful_one(stand_in: StandIn, net: NoiseMLP) -> None:
    state, prompt = torch.randn(4, 7), torch.randn(6)
    assert sample(net, state, prompt, again=True) is None  # never packed
    sample(net, state, prompt)
    assert sample(net, state, prompt, again=True) is not None
    for wrong in (torch.randn(4, 8), torch.randn(7), torch.randn(4, 7).double(), torch.randn(7, 4).t()):
        assert sample(net, wrong, prompt, again=True) is None
    assert sample(net, torch.randn(29)[1:].view(4, 7), prompt, again=True) is None  # not at a multiple of 16 bytes
    assert sample(net, state, torch.randn(3, 6), again=True) is None
    assert sample(net, state, prompt, torch.arange(3), again=True) is None
    net.requires_grad_(True)
    assert sample(net, state, prompt, again=True) is None
    with torch.no_grad():
        assert sample(net, state, prompt, again=True) is not None
    assert sample(net, state[:0], prompt, again=True, samples=2) is None  # a gradient may be asked for
    with torch.no_grad():
        assert sample(net, state[:0], prompt, again=True, samples=2).shape == (0, 2, 3)


def test_a_workspace_is_a_streams(stand_in: StandIn, net: NoiseMLP, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, found = torch.randn(6), {}
    for stream, batch in ((1, 4), (2, 4), (1, 4), (1, 40), (1, 4)):
        monkeypatch.setattr(driver, "place_of", lambda tensor, stream=stream: driver.Place(0, stream, 90))
        sample(net, torch.randn(batch, 7), prompt)
        assert stand_in.launches()[-1][1]["stream"] == stream
        found.setdefault(stream, []).append(resident._workspaces[0, stream][0].data_ptr())
    assert found[1][0] == found[1][1] != found[2][0]
    assert found[1][2] == found[1][3]


def test_a_stream_reads_nothing_that_another_made(
    stand_in: StandIn, net: NoiseMLP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It might read it before it is there."""
    state, prompt, found = torch.randn(4, 7), torch.randn(6), {}

    def on(stream: int, again: bool = False) -> list[str] | None:
        monkeypatch.setattr(driver, "place_of", lambda tensor: driver.Place(0, stream, 90))
        if sample(net, state, prompt, again=again) is None:
            return None
        made = stand_in.launches()
        assert {fields["stream"] for _, fields, _ in made} == {stream}
        call = next(iter(resident._nets[0][net].nets[stream]._calls.values()))
        named = dict(zip(call.own, made[-1][2], strict=True))
        found[stream] = {named[name] for name in ("u_z", "tau", "table", "w2")}
        return [name for name, *_ in made]

    both = ["pack_kernel", "forward_kernel"]
    assert on(1) == both
    assert on(2, again=True) is None
    assert on(2) == both
    assert on(2, again=True) == on(1, again=True) == ["forward_kernel"]
    assert not found[1] & found[2]
    with torch.no_grad():
        net.linears[1].weight.mul_(2.0)
    assert on(1) == both
    assert list(resident._nets[0][net].nets) == [1], "what was packed of former weights is dropped"
    assert on(2) == both


def test_the_driver_is_asked_in_the_devices_context(stand_in: StandIn, net: NoiseMLP) -> None:
    before = stand_in.contexts.value
    stand_in.current.value = -1  # no context in this thread
    sample(net, torch.randn(4, 7), torch.randn(6))
    assert all(fields["device"] == 0 for _, fields, _ in stand_in.launches())
    assert stand_in.contexts.value > before
    assert stand_in.current.value == -1
    stand_in.current.value, before = 0, stand_in.contexts.value
    sample(net, torch.randn(4, 7), torch.randn(6))
    assert stand_in.contexts.value == before


def test_errors_of_the_driver_are_raised(stand_in: StandIn, net: NoiseMLP, tmp_path: Path) -> None:
    from llmdpd import _cuda

    state, prompt = torch.randn(4, 7), torch.randn(6)
    sample(net, state, prompt)
    stand_in.result.value = 700
    with pytest.raises(RuntimeError, match="cuLaunchKernel: an illegal memory access"):
        sample(net, state, prompt, again=True)
    with pytest.raises(RuntimeError, match="can't be loaded"):
        _cuda.Driver(str(tmp_path / "absent.so"))
    fake = _cuda.Driver(driver.LIBRARY)
    with pytest.raises(RuntimeError, match="cuModuleLoadData: another error"):
        _cuda.Kernel(fake, b"no image", "name", 0, 128, 0, "p")
    kernel = _cuda.Kernel(fake, b"\x7fELF", "name", 0, 128, 100 << 10, "pilf")
    assert stand_in.shared.value == 100 << 10
    with pytest.raises(ValueError, match="number of arguments"):
        kernel.launch(1, 1, 0, (0, 1, 2))
    with pytest.raises(ValueError, match="out of range"):
        kernel.launch(1, 1, 0, (0, 2**31, 2, 1.0))


def test_a_kernel_with_other_arguments_is_refused(net: NoiseMLP) -> None:
    class Compiled:
        asm: dict[str, str]
        metadata: Any

    compiled = Compiled()
    compiled.metadata = type("M", (), {"name": "k", "num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0})
    head = ".visible .entry k(\n .param .u64 .ptr k_0,\n .param .u32 k_1,\n"
    compiled.asm = {"ptx": head + ".param .u64 .ptr k_2,\n .param .u64 k_3\n)"}
    driver.check(compiled, "pi")
    for kinds in ("pp", "p", "pii"):
        with pytest.raises(RuntimeError, match="other arguments"):
            driver.check(compiled, kinds)
    compiled.metadata.global_scratch_size = 4
    with pytest.raises(RuntimeError, match="scratch memory"):
        driver.check(compiled, "pi")


def test_the_generators_key() -> None:
    """Neighbouring offsets and seeds give keys that have nothing in common."""
    keys = {resident._mixed(resident._mixed(seed) ^ offset) for seed in range(40) for offset in range(0, 160, 4)}
    assert len(keys) == 1600
    ones = [bin(key ^ resident._mixed(resident._mixed(0))).count("1") for key in keys]
    assert 30 < sum(ones) / len(ones) < 34
    assert -(2**63) <= signed64(max(keys)) < 2**63


def test_a_training_call(stand_in: StandIn, make_launches: Callable[..., list[str]]) -> None:
    assert make_launches() == ["pack_kernel", "forward_kernel", "pack_kernel", "backward_kernel"]


def test_both_critics_are_one_launch(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "computes_mlps", lambda x, members: True)
    monkeypatch.setattr(triton_kernels, "capability_of", lambda device: 90)
    critics = DoubleQ(7, 3, hidden_dim=64)
    inputs = torch.randn(20, 7), torch.randn(20, 3), torch.randn(20, 6)
    with Operations() as forward:
        first, second = critics(*inputs)
    launched = [(name, fields["members"]) for name, fields, _ in stand_in.launches()]
    assert launched == [("mlp_pack_kernel", 2), ("mlp_forward_kernel", 2)]
    assert first.shape == second.shape == (20,)
    with Operations() as backward:
        torch.autograd.grad(first.sum() + second.sum(), list(critics.parameters()))
    launched = [(name, fields["members"]) for name, fields, _ in stand_in.launches()]
    assert launched == [("mlp_backward_kernel", 2), ("weight_gradient_kernel", 2)]
    # Layer by layer PyTorch has 17 and 32, in bf16 37 and 52.
    assert len(forward.work()) <= 2, forward.work()
    assert len(backward.work()) <= 5, backward.work()


def test_learners_are_launched_together(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches a way, and back one product of PyTorch, for any number of learners."""
    monkeypatch.setattr(reverse_diffusion, "capability_of", lambda device: 90)
    L, B, S, A, H, K = 3, 20, 7, 3, 64, 2
    flat = torch.zeros(L, H * (S + A) + 2 * H * H + A * H + 3 * H + A)
    first, w2, w3, w4, u_z, b2, b3, b4 = flat.split([H * (S + A), H * H, H * H, A * H, H, H, H, A], dim=1)
    W_a, W_s = first.view(L, H, S + A).split([A, S], dim=2)
    trunk = [w2.view(L, H, H), b2, w3.view(L, H, H), b3, w4.view(L, A, H), b4]
    key = torch.zeros(L, dtype=torch.int64)
    arguments = torch.zeros(L, B, S), W_s, u_z, torch.zeros(L, K, H), W_a, trunk, torch.zeros(K, 6), key
    chain = ChainArguments(*arguments, None, 1.0, 1.0, 1, False)
    with Operations() as forward:
        actions, tape, packed = learners.forward(chain, True)
    launched = [(name, fields["members"]) for name, fields, _ in stand_in.launches()]
    assert launched == [("pack_kernel", L), ("forward_kernel", L)]
    into = learners.Gradients(W_s.clone(), u_z.clone(), torch.zeros(L, K, H), W_a.clone(), trunk)
    with Operations() as backward:
        learners.backward(actions, chain, tape, packed, into)
    launched = [(name, fields["members"]) for name, fields, _ in stand_in.launches()]
    assert launched == [("backward_kernel", L), ("weight_gradient_kernel", L)]
    assert forward.work() == []
    assert backward.work() == ["aten.baddbmm.default"]


@pytest.fixture
def make_launches(stand_in: StandIn) -> Callable[..., list[str]]:
    from llmdpd.kernels import report
    from llmdpd.kernels import reverse_diffusion as operation

    def make() -> list[str]:
        meta = report.arguments(20, 64, 3, False)
        chain = type(meta)(*(_real(part) for part in meta))
        actions, tape = operation.forward(chain, True)
        operation.backward(actions, torch.zeros(20, 64), chain, tape)
        return [name for name, *_ in stand_in.launches()]

    return make


def _real(part: Any) -> Any:
    if isinstance(part, (list, tuple)):
        return [_real(one) for one in part]
    return torch.zeros(part.shape, dtype=part.dtype) if isinstance(part, Tensor) else part
