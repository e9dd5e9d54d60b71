"""What exports by tracing share: a module with its inputs, and the check that its export acts as the policy does."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.export.action import Action
from llmdpd.export.contents import Prompt, encoded
from llmdpd.export.seeded import Seeded
from llmdpd.ops.philox import philox_normal
from llmdpd.policy.policy import Policy
from llmdpd.policy.session import Seeds

IntArray = NDArray[np.int64]
Run = Callable[[dict[str, Tensor]], NDArray[np.float32]]

TOLERANCE = 1e-5
"""How far exported actions may be from the policy's, root mean square, in units of half their range, or of 1."""
_FAR = 1e-3  # what rounding does not do
_TIES = 0.05
_STATES, _STEPS = 32, 500
EXAMPLE = 3
"""States to trace with: more than one, so that no dimension is taken for a constant."""
_TIMED = 200


@dataclass(frozen=True)
class Check:
    """What an export's check found: the largest difference from the policy's actions, and the time of one action."""

    difference: float
    microseconds: float


class Traced:
    """A policy under one prompt as a module to trace.

    Args:
        policy: acting as it is to act. prompt: its prompt. seeded: whether noise is drawn inside, from a seed a state.

    Raises:
        InputError: as `Action`, and as `Policy.prompt`.
    """

    def __init__(self, policy: Policy, prompt: Prompt, seeded: bool) -> None:
        prompts = encoded(policy, prompt)
        self._policy, self._episodes = policy, policy.episodes(prompts)
        self.action = Action(policy, prompts).eval().requires_grad_(False)
        self.seeded = seeded
        self.module: nn.Module = Seeded(self.action).eval() if seeded else self.action

    def inputs(self, states: int, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs of that many states, by name, in the order of the module's arguments."""
        return self._inputs(states, seed)[0]

    def batch_dimensions(self, name: Any) -> dict[str, dict[int, Any]]:
        """Of each input the dimension that is the batch's, given what that is called."""
        return {field: {int(field == "noise"): name} for field in self.inputs(1)}

    def described(self) -> dict[str, str]:
        """Type and shape of each input, for people."""
        inputs, batch = self.inputs(_STATES), self.batch_dimensions("B")
        shapes = {name: [batch[name].get(place, n) for place, n in enumerate(x.shape)] for name, x in inputs.items()}
        kinds = {name: str(x.dtype).removeprefix("torch.") for name, x in inputs.items()}
        return {name: f"{kinds[name]} [{', '.join(map(str, shapes[name]))}]" for name in inputs}

    def check(self, run: Run) -> Check:
        """Hold what was exported, as a function of the inputs, to the policy's own actions.

        Raises:
            InputError: they differ by more than `TOLERANCE`, or one by far. Where one of several samples is chosen,
                equal values may make it another one in a twentieth of the states.
        """
        parts = [self._apart(run, states, seed) for states, seed in ((_STATES, 1), (1, 2))]
        apart = np.concatenate(parts)
        same = (apart < _FAR).all(axis=1)  # as no NaN is
        another = int((~same).sum())
        if another > (_TIES * len(apart) if self.action.samples > 1 else 0):
            self._refuse(f"{another} of {len(apart)} actions are others", f"none by {_FAR} of its range")
        error = float(np.sqrt(np.square(apart[same]).mean()))
        if error > TOLERANCE:
            self._refuse(f"{error:.1e} apart, root mean square", f"at most {TOLERANCE}")
        return Check(float(apart[same].max()), self._timed(run))

    def _apart(self, run: Run, states: int, seed: int) -> NDArray[np.float64]:
        """How far numbers of actions are from the policy's, [B, H A], in units of half their range."""
        inputs, expected = self._inputs(states, seed)
        found = run(inputs)
        if found.shape != expected.shape:
            self._refuse(found.shape, expected.shape)
        low, high = self._policy.network.action_scaling.parts()[2:]
        half = np.where(np.isfinite(high - low), np.maximum((high - low) / 2, 1e-30), 1.0)
        apart: NDArray[np.float64] = (np.abs(found - expected) / half).reshape(states, -1)
        return apart

    def _refuse(self, found: object, expected: object) -> None:
        problem = "what was exported acts otherwise than the policy"
        raise InputError(problem, field="export", found=found, expected=expected, hint="this is a fault of llmdpd")

    def _timed(self, run: Run) -> float:
        """Median time of an action, after the first few."""
        inputs, times = self.inputs(1), []
        for _ in range(_TIMED):
            before = time.perf_counter()
            run(inputs)
            times.append(time.perf_counter() - before)
        return 1e6 * float(np.median(times))

    def _inputs(self, states: int, seed: int) -> tuple[dict[str, Tensor], NDArray[np.float32]]:
        """Inputs, and the policy's own actions [B, H, A] on them."""
        rows, steps, keys = self._drawn(states, seed)
        return self._given(rows, steps, keys, self.seeded), self._acted(rows, steps, keys)

    def _drawn(self, states: int, seed: int) -> tuple[NDArray[np.float32], IntArray, IntArray]:
        """Observations now and before [2, B, O], as widely spread as the training's; time steps; keys of the noise."""
        rng = np.random.default_rng(seed)
        features, observed = self._policy.network.context.features, self._policy.network.spaces.observed_dim
        mean, std = features.mean.numpy(), features.std.numpy()
        rows = (mean + std * rng.normal(size=(2, states, len(mean)))).astype(np.float32)[..., :observed]
        return rows, rng.integers(0, _STEPS, states), Seeds(seed).next(states)

    def _given(self, rows: NDArray[Any], steps: IntArray, keys: IntArray, seeded: bool) -> dict[str, Tensor]:
        action, key = self.action, torch.from_numpy(keys)
        inputs = {"observation": torch.from_numpy(rows[0]), "step": torch.from_numpy(steps)}
        draws, states = action.coefficients.steps + 1, len(steps)
        if seeded:
            inputs["seed"] = key
        else:
            numbers = action.chunk * action.action_dim
            inputs["noise"] = philox_normal(key, states, action.samples, draws, numbers).float()
        if action.remembered:
            inputs["before"] = torch.from_numpy(rows[1])
        if action.needs_choice and not seeded:
            inputs["choice"] = philox_normal(key, states, 1, draws + 1, 1)[-1, :, 0, 0].float()
        return inputs

    def _acted(self, rows: NDArray[Any], steps: IntArray, keys: IntArray) -> NDArray[np.float32]:
        spaces, scaling = self._policy.network.spaces, self._policy.network.action_scaling
        state = spaces.with_remembered(rows[0], rows[1])
        return scaling.from_unit(self._episodes.sample(np.arange(len(steps)), steps, state, None, keys))


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's words on packages that are not here and names that it changes."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
