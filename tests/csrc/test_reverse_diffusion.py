"""The C++ chain on every instruction set against the reference in float64. See test_properties.py for what must hold
whatever the sizes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP, SamplerCoefficients, philox_normal, reverse_diffusion, sampler_coefficients
from llmdpd.ops import native

TOLERANCE = 2e-5  # relative L2 of the actions
MakeCase = Callable[..., "Case"]


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    with torch.no_grad():
        yield
    native.set_threads(None)


@dataclasses.dataclass
class Case:
    net: NoiseMLP
    plan: SamplerCoefficients
    state: Tensor
    prompt: Tensor

    def run(self, threads: int = 1, **options: Any) -> Tensor:
        native.set_threads(threads)
        return reverse_diffusion(self.net, self.state, self.prompt, self.plan, backend="cpp", **options)

    def check(self, seed: int, samples: int = 1, threads: int = 1) -> None:
        found = self.run(threads, samples=samples, seed=seed)
        noise = philox_normal(seed, len(self.state), samples, self.plan.steps + 1, self.net.action_dim)
        net, state, prompt = copy.deepcopy(self.net).double(), self.state.double(), self.prompt.double()
        expected = reverse_diffusion(net, state, prompt, self.plan, samples, noise=noise, backend="reference")
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        assert float((found - expected).norm() / expected.norm()) <= TOLERANCE


@pytest.fixture
def make_case(make_net: Any, random_coefficients: Any) -> MakeCase:
    def make(
        B: int = 5, S: int = 11, A: int = 4, Z: int = 6, H: int = 33, own_prompts: bool = False, plan: Any = None
    ) -> Case:
        prompt = torch.randn(B, Z) if own_prompts else torch.randn(Z)
        return Case(make_net(S, A, Z, H), plan or random_coefficients(), torch.randn(B, S), prompt)

    return make


@pytest.mark.parametrize("steps", [5, 15])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_samplers(make_case: MakeCase, fresh_seed: int, isa: str, name: Any, steps: int, clip: float | None) -> None:
    make_case(B=40, S=39, Z=256, H=256, plan=sampler_coefficients(name, steps=steps, clip=clip)).check(fresh_seed)


@pytest.mark.parametrize("H", [1, 7, 33, 250, 256])
def test_widths_and_action_sizes(make_case: MakeCase, fresh_seed: int, isa: str, H: int) -> None:
    for A in range(1, 10):
        make_case(A=A, H=H).check(fresh_seed)


@pytest.mark.parametrize(("B", "samples"), list(itertools.product([1, 3, 17, 257], [1, 3, 50])))
def test_batches_and_samples(make_case: MakeCase, fresh_seed: int, isa: str, B: int, samples: int) -> None:
    for own_prompts in (False, True):
        make_case(B=B, H=7, own_prompts=own_prompts).check(fresh_seed, samples, threads=2)


@pytest.mark.parametrize(("S", "Z"), [(0, 6), (11, 0), (0, 0), (1, 1)])
def test_without_state_or_prompt(make_case: MakeCase, fresh_seed: int, isa: str, S: int, Z: int) -> None:
    for own_prompts in (False, True):
        make_case(S=S, Z=Z, own_prompts=own_prompts).check(fresh_seed)


def test_large_preactivations(make_case: MakeCase, fresh_seed: int, isa: str) -> None:
    """Far beyond where e^x overflows, on both sides."""
    case = make_case(B=33, H=64)
    for layer in case.net.layers[:2]:
        layer.weight.mul_(200.0)
    case.net.layers[2].weight.div_(200.0**2)
    case.check(fresh_seed)


def test_one_prompt_for_all_is_that_prompt_for_each(make_case: MakeCase, isa: str) -> None:
    case = make_case(B=29)
    repeated = dataclasses.replace(case, prompt=case.prompt.expand(29, -1))
    assert torch.equal(case.run(seed=5), repeated.run(seed=5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 on: fork in a process with threads
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_forked_child_starts_threads_of_its_own(make_case: MakeCase) -> None:
    case = make_case(B=64)
    expected = case.run(3, seed=1)
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must not come back into pytest.
        status = 1
        try:
            before = len(os.listdir("/proc/self/task"))
            same = torch.equal(case.run(3, seed=1), expected)
            status = 0 if same and len(os.listdir("/proc/self/task")) == before + 2 else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_unknown_instruction_set_is_refused() -> None:
    module = native.module()
    before = module.active_isa()
    with pytest.raises(ValueError, match="can't run here; these can: plain"):
        module.set_isa("avx1024")
    assert module.active_isa() == before == module.runnable_isas()[-1]
