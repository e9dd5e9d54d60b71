"""The tolerance checks hold what is right and catch what is wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from tolerances import Check, Shape, check_all, check_chain, check_noise, noise_plan, print_checks

from llmdpd.diffusion import BackendUnavailableError, NoiseMLP, reverse_diffusion

CPU = torch.device("cpu")
SMALL = Shape(H=24, A=3, S=5, Z=4, B=200, N=2, K=3, prompt_per_state=True)


def test_the_reference_holds_them_all(rng: np.random.Generator, capsys: pytest.CaptureFixture[str]) -> None:
    checks = check_all(CPU, ["reference"], quick=True)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    what = {(check.what, check.precision) for check in checks}
    assert {("actions", "bf16"), ("d layers.0.weight", "fp32"), ("d prompt", "bf16"), ("d state", "fp32")} <= what
    assert {("noise, one key", "fp32"), ("noise, a key a state", "bf16"), ("critics: values", "fp32")} <= what
    assert json.dumps([check.values() for check in checks], allow_nan=False)
    print_checks(checks)
    assert "held" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_small_error_is_caught(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    factor = 1 + 3 * tolerances.GRADIENTS[precision]

    def wrong(net: NoiseMLP, *words: Any, backend: str, **more: Any) -> torch.Tensor:
        actions = reverse_diffusion(net, *words, backend="reference", **more)
        return actions * factor if backend == "cpp" else actions

    monkeypatch.setattr(tolerances, "reverse_diffusion", wrong)
    checks = list(check_chain(SMALL, CPU, "cpp", precision))
    assert len(checks) > 10
    assert not any(check.passed for check in checks)


def test_wrong_noise_is_caught(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(net: NoiseMLP, state: Any, prompt: Any, plan: Any, *words: Any) -> torch.Tensor:
        return reverse_diffusion(net, state, prompt, plan, *words) + 3e-6

    monkeypatch.setattr(tolerances, "reverse_diffusion", wrong)
    assert not any(check.passed for check in check_noise(CPU, "reference", "fp32"))


def test_states_near_the_bound_are_not_taken(rng: np.random.Generator) -> None:
    """One x0 that rounding moves over the bound would hide what the arithmetic does to the gradient."""
    problem = tolerances.Problem(SMALL, CPU)
    parts = [part.double() for part in (problem.state, problem.prompt, problem.noise)]
    margin = tolerances.clip_margin(problem.exact_net, problem.plan, *parts)
    anyone = tolerances.clip_margin(
        problem.exact_net,
        problem.plan,
        torch.randn(200, 5).double(),
        torch.randn(200, 4).double(),
        torch.randn(4, 200, 2, 3).double(),
    )
    assert margin.min() > anyone.median()


def test_a_nan_is_no_pass() -> None:
    check = Check("actions", "", "cpp", "fp32", float("nan"), 1.0)
    assert check.passed is False
    assert json.loads(json.dumps(check.values(), allow_nan=False))["error"] == "nan"


def test_what_cannot_run_is_no_pass_and_no_failure(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*words: Any, backend: str, **more: Any) -> torch.Tensor:
        raise BackendUnavailableError("not built")

    monkeypatch.setattr(tolerances, "reverse_diffusion", absent)
    checks = list(check_chain(SMALL, CPU, "cpp", "fp32"))
    assert [(check.what, check.passed, check.reason) for check in checks] == [
        ("actions", None, "not built"),
        ("gradients", None, "not built"),
    ]


def test_a_chain_can_return_each_of_its_draws(rng: np.random.Generator) -> None:
    net, noise = NoiseMLP(5, 2, 3, 8), torch.randn(5, 6, 2)
    for draw in range(5):
        found = reverse_diffusion(
            net, torch.randn(6, 5), torch.randn(3), noise_plan(draw, 4), noise=noise, backend="reference"
        )
        torch.testing.assert_close(found, noise[draw], rtol=0, atol=0)


def test_the_command_says_what_is_not_held(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert tolerances.main(["--quick", "--backends", "reference"]) == 0
    monkeypatch.setitem(tolerances.ACTIONS, "fp32", 1e-30)
    assert tolerances.main(["--quick", "--backends", "reference"]) == 1
    assert "NOT HELD: reference fp32 actions" in capsys.readouterr().out
