"""Variance schedules and samplers: a sampler is a table of coefficients.

Every sampler here is the same recurrence, with one row of coefficients for each step (k = K first):

    x0      = clip(p_k a_k + e_k epsilon)
    a_{k-1} = A_k a_k + B_k x0 + C_k x0_previous + S_k xi_k

so that no kernel knows a sampler's or a schedule's name. `sampler_coefficients` computes the table in float64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from llmdpd.errors import InputError
from llmdpd.ops.arguments import Precision as Precision
from llmdpd.ops.arguments import SamplerCoefficients

ScheduleName = Literal["vp", "linear", "cosine"]
SamplerName = Literal["ddpm", "ddim", "dpm++2m"]
Array = NDArray[np.float64]


def alphas(schedule: ScheduleName, steps: int) -> Array:
    """The variance schedule alpha_1 … alpha_T of the forward process, float64 [T].

    `vp`: alpha_i = exp(-b0/T - (b1 - b0)(2i - 1)/(2 T^2)), b0 = 0.1, b1 = 10 (Diffusion-QL). `linear`: DDPM's betas
    1e-4 … 2e-2 of 1000 steps, scaled by 1000/T so that the last step is noise for any T. `cosine`: Nichol & Dhariwal
    2021, offset 0.008. Betas are at most 0.999.
    """
    if steps < 1:
        raise InputError("a diffusion chain needs a step", field="steps", found=steps, expected="an integer from 1")
    index = np.arange(1, steps + 1, dtype=np.float64)
    if schedule == "vp":
        return np.exp(-0.1 / steps - 0.5 * (10.0 - 0.1) * (2 * index - 1) / steps**2)
    if schedule == "linear":
        scale = 1000.0 / steps
        return 1.0 - np.minimum(np.linspace(1e-4 * scale, 2e-2 * scale, steps), 0.999)
    if schedule == "cosine":
        bar = np.cos((np.linspace(0.0, 1.0, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        return 1.0 - np.clip(1.0 - bar[1:] / bar[:-1], 0.0, 0.999)
    raise InputError("unknown variance schedule", field="schedule", found=schedule, expected=get_args(ScheduleName))


@lru_cache(maxsize=64)
def sampler_coefficients(
    name: SamplerName = "ddpm",
    steps: int = 5,
    schedule: ScheduleName = "vp",
    clip: float | None = 1.0,
    *,
    train_steps: int | None = None,
    eta: float = 0.0,
    noise_scale: float = 1.0,
) -> SamplerCoefficients:
    """The coefficients of a sampler. Callers with the same arguments share one object.

    Args:
        name: `ddpm` (Ho et al. 2020: the paper's equation 4 where nothing is clipped), `ddim` (Song et al. 2021, with
            `eta`), or `dpm++2m` (DPM-Solver++(2M), Lu et al. 2022, data prediction).
        steps: number of denoising steps K.
        schedule: variance schedule that the network was trained with.
        clip: bound on x0 at every step, and on the action; None for none.
        train_steps: length T of the training schedule; by default `steps`. `ddpm` needs `steps == train_steps`.
        noise_scale: factor on all noise, the start's included; below 1, actions lie nearer to the mode.
        eta: DDIM's noise, 0 (deterministic) to 1 (DDPM's posterior variance).

    Raises:
        InputError: an unknown name, or numbers out of range.
    """
    total = steps if train_steps is None else train_steps
    _check_arguments(name, steps, total, clip, eta, noise_scale)
    bar = np.cumprod(alphas(schedule, total), dtype=np.float64)
    index = _timesteps(name, bar, steps)
    now = bar[index]
    after = np.append(bar[index[1:]], 1.0)
    builders = {"ddpm": _ddpm, "ddim": _ddim, "dpm++2m": _dpm_solver_2m}
    a, b, c, s = builders[name](now, after, eta)
    rows = (1 / np.sqrt(now), -np.sqrt(1 / now - 1), a, b, c, s * noise_scale)
    for array in (index, *rows):
        array.flags.writeable = False
    return SamplerCoefficients(name, schedule, total, clip, noise_scale, index, *rows)


def _check_arguments(name: str, steps: int, total: int, clip: float | None, eta: float, noise_scale: float) -> None:
    if name == "ddpm" and 1 <= steps < total:
        raise InputError("ddpm walks every training step", field="steps", found=steps, expected=total, hint="use ddim")
    for fits, problem, field, found, expected in (
        (name in get_args(SamplerName), "unknown sampler", "name", name, get_args(SamplerName)),
        (1 <= steps <= total, "sampler steps out of range", "steps", steps, f"1 to {total} (train_steps)"),
        (clip is None or clip > 0, "the action bound must be positive", "clip", clip, "a number above 0, or None"),
        (0 <= noise_scale < np.inf, "the noise scale is out of range", "noise_scale", noise_scale, "a number from 0"),
        (0 <= eta <= 1, "DDIM's noise is out of range", "eta", eta, "0 to 1"),
    ):
        if not fits:
            raise InputError(problem, field=field, found=found, expected=expected)


def _timesteps(name: SamplerName, bar: Array, steps: int) -> NDArray[np.int64]:
    """Time indices from T-1 down, the last training step always first: the chain starts at N(0, I).

    Evenly spaced; for `dpm++2m` evenly in log-SNR, as its authors do. It extrapolates from one step to the next, and
    where the next is much longer (which even time steps are at the end of a chain) its error exceeds first order's.
    """
    if name != "dpm++2m":
        return np.round(np.linspace(len(bar) - 1, 0, steps)).astype(np.int64)
    log_snr = np.log(bar / (1 - bar))
    wanted = np.linspace(log_snr[-1], log_snr[0], steps)
    index = np.abs(wanted[:, None] - log_snr).argmin(axis=1)
    for row in range(1, steps):  # distinct also where the schedule is coarser than what is wanted
        index[row] = max(min(index[row], index[row - 1] - 1), steps - 1 - row)
    return index


Rows = tuple[Array, Array, Array, Array]


def _ddpm(now: Array, after: Array, eta: float) -> Rows:
    """DDPM's posterior mean and variance: with x0 unclipped, the paper's equation 4."""
    alpha = now / after
    a = np.sqrt(alpha) * (1 - after) / (1 - now)
    b = np.sqrt(after) * (1 - alpha) / (1 - now)
    s = np.sqrt((1 - alpha) * (1 - after) / (1 - now))
    return a, b, np.zeros_like(a), s


def _ddim(now: Array, after: Array, eta: float) -> Rows:
    """DDIM: a_{k-1} = sqrt(after) x0 + sqrt(1 - after - s^2) eps + s xi, with eps from a_k and the (clipped) x0."""
    s = eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    direction = np.sqrt(np.maximum(1 - after - s**2, 0.0)) / np.sqrt(1 - now)
    return direction, np.sqrt(after) - direction * np.sqrt(now), np.zeros_like(s), s


def _dpm_solver_2m(now: Array, after: Array, eta: float) -> Rows:
    """DPM-Solver++(2M): second order in the log-SNR; first order in the first step, and in the last (log-SNR: inf)."""
    with np.errstate(divide="ignore"):
        log_snr = np.log(np.sqrt(now) / np.sqrt(1 - now))
        log_snr_after = np.log(np.sqrt(after) / np.sqrt(1 - after))
    h = log_snr_after - log_snr
    ratio = np.sqrt(1 - after) / np.sqrt(1 - now)
    gain = -np.sqrt(after) * np.expm1(-h)
    r = np.zeros_like(h)
    if len(h) > 2:
        r[1:-1] = 0.5 * h[1:-1] / h[:-2]  # 1 / (2 r) of the paper, r = h_previous / h
    return ratio, gain * (1 + r), -gain * r, np.zeros_like(h)
