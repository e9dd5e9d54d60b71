"""The C++ sampler against the chain written out in float64 numpy."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.diffusion.noise_mlp import NoiseMLP
from llmdpd.diffusion.schedules import SamplerPlan, sampler_plan
from llmdpd.errors import InputError
from llmdpd.ops import native, packed
from llmdpd.ops.packed import sample
from llmdpd.ops.philox import philox_normal

TOLERANCE = 2e-5  # relative L2 of the actions


@dataclasses.dataclass
class Case:
    net: NoiseMLP
    plan: SamplerPlan
    state: torch.Tensor
    prompt: torch.Tensor

    def run(self, **options: Any) -> np.ndarray:
        return sample(self.net, self.plan, self.state, self.prompt, **options).numpy()

    def rows(self, part: slice) -> Case:
        prompt = self.prompt if self.prompt.ndim == 1 else self.prompt[part]
        return dataclasses.replace(self, state=self.state[part], prompt=prompt)


def make_case(
    rng: np.random.Generator,
    *,
    B: int = 5,
    S: int = 11,
    A: int = 4,
    Z: int = 6,
    H: int = 33,
    T: int = 8,
    prompt_per_state: bool = False,
    plan: SamplerPlan | None = None,
) -> Case:
    net = NoiseMLP(S, A, Z, H, T)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = 1.5 / np.sqrt(parameter.shape[-1])
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape) * scale))
    state = torch.from_numpy(rng.normal(size=(B, S)).astype(np.float32))
    prompt = torch.from_numpy(rng.normal(size=(B, Z) if prompt_per_state else Z).astype(np.float32))
    return Case(net, plan or random_plan(rng), state, prompt)


def random_plan(rng: np.random.Generator, steps: int = 5) -> SamplerPlan:
    """A table in which no coefficient is zero or one, so that each of them has to be used, and rightly."""
    names = ["p", "e", "A", "B", "C", "S"]
    table = {name: rng.uniform(0.2, 0.8, steps) * rng.choice([-1, 1], steps) for name in names}
    table["S"] = np.abs(table["S"])
    return dataclasses.replace(sampler_plan("ddpm", steps=steps), clip=0.9, start=float(rng.uniform(0.5, 1.5)), **table)


def mish(x: np.ndarray) -> np.ndarray:
    return x * np.tanh(np.logaddexp(0.0, x))


def reference(case: Case, draws: np.ndarray) -> np.ndarray:
    """The chain in float64: draws [K + 1, B, N, A] -> [B, N, A]."""
    net, plan = copy.deepcopy(case.net).double(), case.plan
    weights = [layer.weight.detach().numpy() for layer in net.layers]
    biases = [layer.bias.detach().numpy() for layer in net.layers]
    with torch.no_grad():
        embedding = net.time_embedding(torch.tensor(plan.timesteps)).numpy()
    batch, samples = draws.shape[1:3]

    def spread(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x if x.ndim == 1 else x[:, None, :], (batch, samples, x.shape[-1]))

    state, prompt = spread(case.state.double().numpy()), spread(case.prompt.double().numpy())
    bound = np.inf if plan.clip is None else plan.clip
    a, x0_previous = plan.start * draws[0], np.zeros_like(draws[0])
    for k in range(plan.steps):
        hidden = np.concatenate([a, spread(embedding[k]), state, prompt], axis=-1)
        for weight, bias in zip(weights[:3], biases[:3], strict=True):
            hidden = mish(hidden @ weight.T + bias)
        epsilon = hidden @ weights[3].T + biases[3]
        x0 = np.clip(plan.p[k] * a + plan.e[k] * epsilon, -bound, bound)
        a = plan.A[k] * a + plan.B[k] * x0 + plan.C[k] * x0_previous + plan.S[k] * draws[k + 1]
        x0_previous = x0
    return np.clip(a, -bound, bound)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.size == expected.size
    return float(np.linalg.norm(found.ravel() - expected.ravel()) / np.linalg.norm(expected))


def check(case: Case, rng: np.random.Generator, samples: int = 1, **options: Any) -> None:
    seed = int(rng.integers(2**62))
    batch, action_dim = case.state.shape[0], case.net.action_dim
    found = case.run(samples=samples, seed=seed, **options)
    assert found.dtype == np.float32
    assert found.shape == ((batch, action_dim) if samples == 1 else (batch, samples, action_dim))
    draws = philox_normal(seed, batch, samples, case.plan.steps + 1, action_dim).numpy()
    assert relative_error(found, reference(case, draws)) <= TOLERANCE


@pytest.mark.parametrize("steps", [5, 15])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_samplers(rng: np.random.Generator, isa: str, name: Any, steps: int, clip: float | None) -> None:
    plan = sampler_plan(name, steps=steps, clip=clip)
    check(make_case(rng, B=40, S=39, Z=256, H=256, T=16, plan=plan), rng)


@pytest.mark.parametrize("H", [1, 7, 33, 250, 256])
def test_widths_and_action_sizes(rng: np.random.Generator, isa: str, H: int) -> None:
    for A in range(1, 10):
        check(make_case(rng, A=A, H=H), rng)


@pytest.mark.parametrize(("B", "samples"), list(itertools.product([1, 3, 17, 257], [1, 3, 50])))
def test_batches_and_samples(rng: np.random.Generator, isa: str, B: int, samples: int) -> None:
    for prompt_per_state in (False, True):
        check(make_case(rng, B=B, H=7, prompt_per_state=prompt_per_state), rng, samples, threads=2)


@pytest.mark.parametrize("samples", [1, 3])
def test_empty_batch(rng: np.random.Generator, isa: str, samples: int) -> None:
    found = make_case(rng, B=0, prompt_per_state=True).run(samples=samples, seed=1)
    assert found.shape == ((0, 4) if samples == 1 else (0, 3, 4))


@pytest.mark.parametrize(("S", "Z"), [(0, 6), (11, 0), (0, 0), (1, 1)])
def test_without_state_or_prompt(rng: np.random.Generator, isa: str, S: int, Z: int) -> None:
    for prompt_per_state in (False, True):
        check(make_case(rng, S=S, Z=Z, prompt_per_state=prompt_per_state), rng)


def test_large_preactivations(rng: np.random.Generator, isa: str) -> None:
    """Far beyond where e^x overflows, on both sides."""
    case = make_case(rng, B=33, H=64)
    with torch.no_grad():
        for layer in case.net.layers[:2]:
            layer.weight.mul_(200.0)
        case.net.layers[2].weight.div_(200.0**2)
    check(case, rng)


def test_same_bits_for_any_split_and_thread_count(rng: np.random.Generator, isa: str) -> None:
    case = make_case(rng, B=101, H=70, prompt_per_state=True)
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, 101))
    whole = case.run(samples=3, seed=seeds)
    for threads in (2, 3, 8):
        assert np.array_equal(case.run(samples=3, seed=seeds, threads=threads), whole)
    for size in (1, 2, 13, 64):
        for first in range(0, 101, size):
            part = slice(first, min(first + size, 101))
            assert np.array_equal(case.rows(part).run(samples=3, seed=seeds[part]), whole[part])


def test_one_prompt_for_all_is_that_prompt_for_each(rng: np.random.Generator, isa: str) -> None:
    case = make_case(rng, B=29)
    repeated = dataclasses.replace(case, prompt=case.prompt.expand(29, -1))
    assert np.array_equal(case.run(seed=5), repeated.run(seed=5))


def test_seeds_per_state(rng: np.random.Generator, isa: str) -> None:
    case = make_case(rng, B=9)
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, 9))
    draws = philox_normal(seeds, 9, 4, case.plan.steps + 1, 4).numpy()
    assert relative_error(case.run(samples=4, seed=seeds), reference(case, draws)) <= TOLERANCE


def test_given_noise(rng: np.random.Generator, isa: str) -> None:
    case = make_case(rng, B=9)
    noise = rng.normal(size=(6, 9, 4, 4)).astype(np.float32)
    assert relative_error(case.run(samples=4, noise=torch.from_numpy(noise)), reference(case, noise)) <= TOLERANCE
    single = case.run(noise=torch.from_numpy(noise[:, :, 0]))
    assert relative_error(single, reference(case, noise[:, :, :1])) <= TOLERANCE
    assert np.array_equal(case.run(noise=torch.from_numpy(noise[:, :, :1])), single)


@pytest.mark.parametrize("poisoned", ["state", "prompt", "noise"])
def test_nan_stays_in_its_row(rng: np.random.Generator, isa: str, poisoned: str) -> None:
    case = make_case(rng, B=31, H=40, prompt_per_state=True)
    noise = torch.from_numpy(rng.normal(size=(6, 31, 2, 4)).astype(np.float32))
    clean = case.run(samples=2, noise=noise)
    row = int(rng.integers(31))
    {"state": case.state[row], "prompt": case.prompt[row], "noise": noise[2, row]}[poisoned][..., 0] = np.nan
    found = case.run(samples=2, noise=noise)
    assert np.isnan(found[row]).all()
    others = np.arange(31) != row
    assert np.array_equal(found[others], clean[others])


def test_changed_weights_are_used_at_once(rng: np.random.Generator) -> None:
    case = make_case(rng)
    before = case.run(seed=1)
    with torch.no_grad():
        case.net.layers[1].weight.mul_(-1.0)
    assert not np.array_equal(case.run(seed=1), before)
    check(case, rng)


def test_views_that_are_not_contiguous(rng: np.random.Generator) -> None:
    case = make_case(rng, B=6, S=11)
    wide = torch.zeros(11, 12)
    wide[:, ::2] = case.state.T
    strided = dataclasses.replace(case, state=wide[:, ::2].T)
    assert not strided.state.is_contiguous()
    assert np.array_equal(strided.run(seed=2), case.run(seed=2))


def test_calls_from_several_python_threads(rng: np.random.Generator) -> None:
    """Two callers at once share one pool; neither waits for ever nor sees the other's rows."""
    cases = [make_case(rng, B=64, H=48) for _ in range(2)]
    expected = [case.run(seed=1) for case in cases]
    wrong: list[int] = []

    def call(which: int) -> None:
        for _ in range(200):
            if not np.array_equal(cases[which].run(seed=1, threads=2), expected[which]):
                wrong.append(which)

    workers = [threading.Thread(target=call, args=(which,)) for which in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert wrong == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 on: fork in a process with threads
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_forked_child_starts_threads_of_its_own(rng: np.random.Generator) -> None:
    case = make_case(rng, B=64)
    expected = case.run(seed=1, threads=3)
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must not come back into pytest.
        status = 1
        try:
            before = len(os.listdir("/proc/self/task"))
            same = np.array_equal(case.run(seed=1, threads=3), expected)
            status = 0 if same and len(os.listdir("/proc/self/task")) == before + 2 else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


WRONG_INPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "state of another width": ("state", {"state": torch.zeros(5, 12)}),
    "state without a batch": ("state", {"state": torch.zeros(11)}),
    "state in float64": ("state", {"state": torch.zeros(5, 11, dtype=torch.float64)}),
    "state elsewhere": ("state", {"state": torch.zeros(5, 11, device="meta")}),
    "prompt of another width": ("prompt", {"prompt": torch.zeros(7)}),
    "prompt of another batch": ("prompt", {"prompt": torch.zeros(4, 6)}),
    "prompt in float16": ("prompt", {"prompt": torch.zeros(6, dtype=torch.float16)}),
    "no samples": ("samples", {"samples": 0}),
    "no threads": ("threads", {"threads": 0}),
    "neither seed nor noise": ("seed", {"seed": None}),
    "seeds of another batch": ("seed", {"seed": torch.zeros(4, dtype=torch.int64)}),
    "seeds in int32": ("seed", {"seed": torch.zeros(5, dtype=torch.int32)}),
    "noise with a draw too few": ("noise", {"noise": torch.zeros(5, 5, 4)}),
    "noise without samples": ("noise", {"noise": torch.zeros(6, 5, 4), "samples": 2}),
    "noise in float64": ("noise", {"noise": torch.zeros(6, 5, 4, dtype=torch.float64)}),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_inputs_are_refused(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = make_case(rng)
    field, change = WRONG_INPUTS[name]
    options = {"net": case.net, "plan": case.plan, "state": case.state, "prompt": case.prompt, "seed": 1} | change

    def reached(*_: object) -> None:
        raise AssertionError("native code was reached")

    monkeypatch.setattr(packed, "packed", reached)
    with pytest.raises(InputError) as caught:
        sample(**options)
    assert caught.value.field == field


def test_a_net_in_float64_is_refused(rng: np.random.Generator) -> None:
    case = make_case(rng)
    case.net.double()
    with pytest.raises(InputError, match=r"layers\[0\].weight"):
        case.run(seed=1)


def test_native_code_refuses_what_does_not_fit(rng: np.random.Generator) -> None:
    """The last guard, for callers that go round `sample`."""
    f32 = np.float32
    H, A, T, S, Z, K, B = 8, 2, 4, 3, 5, 5, 6
    module = native.module()
    trunk = [np.zeros(shape, f32) for shape in ((H, H), H, (H, H), H, (A, H), A)]
    first = np.zeros((H, A + T + S + Z), f32)
    net = module.PackedNet(A, T, first, np.zeros(H, f32), trunk, S, False)
    sampler = module.Sampler(net, np.zeros((K, 6), f32), np.zeros((K, T), f32), 1.0, 1.0)
    good: dict[str, Any] = {
        "state": np.zeros((B, S), f32),
        "prompt": np.zeros(Z, f32),
        "samples": 1,
        "keys": np.zeros(1, np.uint64),
        "noise": None,
        "actions": np.zeros((B, A), f32),
        "threads": 1,
    }
    sampler.run(**good)
    changes = {
        "state": np.zeros((B, S + 1), f32),
        "prompt": np.zeros((B - 1, Z), f32),
        "keys": np.zeros(B - 1, np.uint64),
        "noise": np.zeros((K, B, A), f32),
        "actions": np.zeros((B - 1, A), f32),
        "samples": 2,
    }
    for name, value in changes.items():
        with pytest.raises(ValueError, match="wrong shape"):
            sampler.run(**{**good, name: value})
    with pytest.raises(ValueError, match="too many rows"):
        sampler.run(**{**good, "samples": 1 << 40})
    for name in ("state", "actions"):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            sampler.run(**{**good, name: good[name].astype(np.float64)})
    for wrong in range(6):
        with pytest.raises(ValueError, match="wrong shape"):
            module.PackedNet(
                A, T, first, np.zeros(H, f32), [*trunk[:wrong], np.zeros((H, 1), f32), *trunk[wrong + 1 :]], S, False
            )
    with pytest.raises(ValueError, match="wrong shape"):
        module.PackedNet(A, T, first[:-1], np.zeros(H, f32), trunk, S, False)
    with pytest.raises(ValueError, match="wrong shape"):
        module.Sampler(net, np.zeros((K, 6), f32), np.zeros((K - 1, T), f32), 1.0, 1.0)


def test_unknown_instruction_set_is_refused() -> None:
    module = native.module()
    before = module.active_isa()
    with pytest.raises(ValueError, match="can't run here; these can: plain"):
        module.set_isa("avx1024")
    assert module.active_isa() == before == module.runnable_isas()[-1]
