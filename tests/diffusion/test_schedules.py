"""Variance schedules and samplers against formulas written anew and numbers typed in by hand.

DDPM's are compared in test_reference.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmdpd.diffusion import alphas, sampler_coefficients
from llmdpd.errors import InputError

SCHEDULES = ["vp", "linear", "cosine"]


def test_vp_of_five_steps_by_hand() -> None:
    # exp(-0.02 - 9.9 (2i - 1) / 50)
    np.testing.assert_allclose(alphas("vp", 5), np.exp([-0.218, -0.614, -1.01, -1.406, -1.802]), rtol=1e-12)
    np.testing.assert_allclose(alphas("vp", 5), [0.804126, 0.541182, 0.364219, 0.245122, 0.164969], atol=2e-6)


def test_linear_of_thousand_steps_is_ddpms() -> None:
    beta = 1 - alphas("linear", 1000)
    assert beta[0] == pytest.approx(1e-4)
    assert beta[-1] == pytest.approx(2e-2)
    assert beta[500] == pytest.approx(1e-4 + (2e-2 - 1e-4) * 500 / 999)


def test_cosine_follows_its_alpha_bar() -> None:
    steps = 40
    bar = np.cumprod(alphas("cosine", steps))
    for i in (1, 7, 39):
        f, f0 = (np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 for t in (i / steps, 0.0))
        assert bar[i - 1] == pytest.approx(f / f0)
    assert alphas("cosine", steps)[-1] == pytest.approx(1e-3)  # beta is held at 0.999


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5, 50, 1000])
def test_alphas_are_a_variance_schedule(schedule: Any, steps: int) -> None:
    values = alphas(schedule, steps)
    assert values.shape == (steps,)
    assert values.dtype == np.float64
    assert ((values > 0) & (values < 1)).all()
    if steps >= 5:
        assert np.cumprod(values)[-1] < 0.01  # the end of the chain is noise


def test_unknown_schedule_and_no_steps() -> None:
    with pytest.raises(InputError, match="schedule") as error:
        alphas("quadratic", 5)  # type: ignore[arg-type]
    assert "cosine" in str(error.value)
    with pytest.raises(InputError, match="steps"):
        alphas("vp", 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_full_noise_is_ddpm(schedule: Any) -> None:
    ddpm = sampler_coefficients("ddpm", steps=9, schedule=schedule)
    ddim = sampler_coefficients("ddim", steps=9, schedule=schedule, eta=1.0)
    for name in "peABCS":
        np.testing.assert_allclose(getattr(ddim, name), getattr(ddpm, name), atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_without_noise_the_last_step_is_x0(name: Any, steps: int) -> None:
    plan = sampler_coefficients(name, steps=steps, train_steps=20)
    assert (plan.S == 0).all()
    assert (plan.A[-1], plan.B[-1], plan.C[-1]) == pytest.approx((0.0, 1.0, 0.0))
    assert plan.C[0] == 0


@pytest.mark.parametrize("name", ["ddim", "dpm++2m"])
def test_marginals_are_kept(name: Any) -> None:
    """Where x0 is right at every step, a_k stays sqrt(bar) x0 + sqrt(1 - bar) eps of one x0 and eps."""
    plan = sampler_coefficients(name, steps=7, train_steps=30)
    after = np.append(np.cumprod(alphas("vp", 30))[plan.timesteps[1:]], 1.0)
    now = np.cumprod(alphas("vp", 30))[plan.timesteps]
    x0, eps = 0.37, -1.21
    for k in range(7):
        a = np.sqrt(now[k]) * x0 + np.sqrt(1 - now[k]) * eps
        assert plan.p[k] * a + plan.e[k] * eps == pytest.approx(x0)
        reached = plan.A[k] * a + (plan.B[k] + plan.C[k]) * x0
        assert reached == pytest.approx(np.sqrt(after[k]) * x0 + np.sqrt(1 - after[k]) * eps)


def test_dpm_solver_2m_is_its_authors_formula() -> None:
    """Lu et al. 2022, algorithm 2: D = (1 + 1/2r) x0 - 1/2r x0_previous, with unequal steps; a = ratio a + gain D."""
    plan = sampler_coefficients("dpm++2m", steps=8)
    bar = np.append(np.cumprod(alphas("vp", 8))[::-1], 1.0)
    log_snr = [0.5 * math.log(b / (1 - b)) if b < 1 else math.inf for b in bar]
    uneven = False
    for k in range(8):
        sigma, sigma_after = math.sqrt(1 - bar[k]), math.sqrt(1 - bar[k + 1])
        gain = -math.sqrt(bar[k + 1]) * math.expm1(-(log_snr[k + 1] - log_snr[k]))
        weight = 0.0
        if 0 < k < 7:
            r = (log_snr[k] - log_snr[k - 1]) / (log_snr[k + 1] - log_snr[k])
            weight = 1 / (2 * r)
            uneven |= abs(r - 1) > 0.1
        assert plan.A[k] == pytest.approx(sigma_after / sigma)
        assert plan.B[k] == pytest.approx(gain * (1 + weight))
        assert plan.C[k] == pytest.approx(-gain * weight)
    assert uneven


def test_dpm_solver_steps_are_even_in_log_snr() -> None:
    bar = np.cumprod(alphas("vp", 1000))
    for steps in (5, 10, 20):
        index = sampler_coefficients("dpm++2m", steps=steps, train_steps=1000).timesteps
        gaps = np.diff(np.log(bar[index] / (1 - bar[index])))
        assert gaps.max() / gaps.min() < 1.4
    for steps in (3, 9, 29, 30):
        index = sampler_coefficients("dpm++2m", steps=steps, train_steps=30).timesteps
        assert (index[0], index[-1], len(index)) == (29, 0, steps)
        assert (np.diff(index) < 0).all()


def test_fewer_steps_never_repeat_a_timestep() -> None:
    for total in range(1, 40):
        for steps in range(1, total + 1):
            index = sampler_coefficients("ddim", steps=steps, train_steps=total).timesteps
            assert index[0] == total - 1
            assert len(index) == steps
            assert (np.diff(index) < 0).all()
            assert steps == 1 or index[-1] == 0


def test_noise_scale_is_in_start_and_steps() -> None:
    full, half = sampler_coefficients("ddpm"), sampler_coefficients("ddpm", noise_scale=0.5)
    assert half.start == 0.5
    np.testing.assert_allclose(half.S, 0.5 * full.S)
    np.testing.assert_array_equal(half.A, full.A)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"name": "euler"}, "name"),
        ({"schedule": "quadratic"}, "schedule"),
        ({"steps": 0}, "steps"),
        ({"name": "ddim", "steps": 6, "train_steps": 5}, "steps"),
        ({"name": "ddpm", "steps": 4, "train_steps": 5}, "steps"),
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"noise_scale": -0.1}, "noise_scale"),
        ({"noise_scale": float("nan")}, "noise_scale"),
        ({"noise_scale": float("inf")}, "noise_scale"),
        ({"name": "ddim", "eta": -0.1}, "eta"),
        ({"name": "ddim", "eta": 1.5}, "eta"),
        ({"name": "ddim", "eta": float("nan")}, "eta"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        sampler_coefficients(**arguments)
    assert error.value.field == field
    assert error.value.found is not None
    assert error.value.expected is not None


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
def test_a_plan_is_shared_and_cannot_be_written(name: str) -> None:
    plan = sampler_coefficients(name, 5)
    assert sampler_coefficients(name, 5) is plan
    for rows in ("timesteps", "p", "e", "A", "B", "C", "S"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, rows)[0] = 7
