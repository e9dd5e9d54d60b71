"""What users give a policy, as arrays that fit it: observations, rewards, demonstrations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.nn.spaces import ActionScaling, Spaces
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, TrajectoryTokens, make_tokens, read_part
from llmdpd.prompts.useful_part import Recorded
from llmdpd.tasks.layout import Layout

_log = logging.getLogger(__name__)

Observations = ArrayLike | Mapping[str, ArrayLike]
"""Numbers [S] or [B, S]; or those of a Dict space by key, each [...] or [B, ...]."""
Demonstration = Trajectory | tuple[Observations, ArrayLike]
"""A `Trajectory`, or observations [T, S], or by key, and actions [T, A]."""
Demonstrations = Demonstration | Sequence[Demonstration]
"""One demonstration, or a list of several that make one prompt together."""

MOST_DEMONSTRATIONS = 16
"""Demonstrations of one prompt at most."""


def read_observations(observation: Observations, width: int, keys: Sequence[str] = ()) -> NDArray[np.float32]:
    """Observations [S] or [B, S], S being `width`; of a Dict space those of its `keys`, in their order.

    Raises:
        InputError: of another width, or no finite numbers; a Dict where no keys are known, or that lacks one of them.
    """
    if isinstance(observation, Mapping):
        observation = _joined(observation, width, keys)
    try:
        # A copy, since torch takes no arrays that run backwards or can't be written.
        state = np.array(_numbers(observation), order="C")
    except (TypeError, ValueError) as error:
        raise InputError(
            "the observation is no array of numbers", field="observation", found=str(error), expected="[S] or [B, S]"
        ) from None
    if state.ndim not in (1, 2) or state.shape[-1] != width:
        raise InputError(
            "wrong observation", field="observation", found=state.shape, expected=f"[{width}] or [B, {width}]"
        )
    if not np.isfinite(state).all():
        raise InputError("NaN or Inf in the observation", field="observation", expected="finite numbers")
    return state


def _numbers(values: ArrayLike) -> NDArray[np.float32]:
    """Real numbers as float32. NumPy would make some of dates, texts and masked values, and drop imaginary parts.

    Raises:
        TypeError, ValueError: no real numbers.
    """
    try:
        found = np.asarray(values)
    except RuntimeError as error:  # torch's, of a tensor that requires gradients
        raise TypeError(str(error)) from None
    if np.ma.is_masked(values) or found.dtype.kind not in "fiubO":
        raise TypeError("masked values" if np.ma.is_masked(values) else f"type {found.dtype}")
    return np.asarray(found, np.float32)


def check_keys(keys: object, widths: object = ()) -> None:
    """Raise `InputError` where what a policy folder says of the keys of Dict observations is no list of names.

    `widths`: how many numbers each has, or none where that is not known.
    """
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError("wrong keys", field="metadata.observation", found=repr(keys)[:80], expected="a list of names")
    if widths and (not isinstance(widths, list) or [type(width) for width in widths] != [int] * len(keys)):
        found, field = repr(widths)[:80], "metadata.observation_widths"
        raise InputError("wrong widths", field=field, found=found, expected="a whole number for each key")


def _joined(parts: Mapping[str, ArrayLike], width: int, keys: Sequence[str]) -> NDArray[np.float32]:
    """The numbers of a Dict observation, or of B of them, in the order of the keys that are read."""
    missing = [key for key in keys if key not in parts]
    if not keys or missing:
        found = "a dict of " + (", ".join(map(str, parts)) or "nothing")
        expected = ", ".join(keys) or f"one array of {width} numbers, since the policy was trained on such"
        raise InputError("wrong observation", field="observation", found=found, expected=expected)
    try:
        arrays = [_numbers(parts[key]) for key in keys]
    except (TypeError, ValueError) as error:
        raise InputError("the observation is no numbers", field="observation", found=str(error)) from None
    single = sum(array.size for array in arrays) == width
    # One row of a vector environment has as many numbers: there every part has a first dimension of 1.
    if single and any(array.ndim > 1 for array in arrays) and all(array.shape[:1] == (1,) for array in arrays):
        single = False
    rows = () if single else arrays[0].shape[:1]
    if any(array.shape[: len(rows)] != rows for array in arrays):
        found = ", ".join(f"{key} {list(array.shape)}" for key, array in zip(keys, arrays, strict=True))
        raise InputError("wrong observation", field="observation", found=found, expected=f"{width} numbers, or B times")
    return np.concatenate([array.reshape(*rows, -1) for array in arrays], axis=-1)


def read_rewards(reward: ArrayLike | None, count: int) -> NDArray[np.float32]:
    """Rewards [B] of the last actions, from one number or B of them; zeros where none were given.

    Raises:
        InputError: another number of them, or no finite numbers.
    """
    expected = f"a finite number, or {count} of them"
    try:
        given = np.zeros(count, np.float32) if reward is None else _numbers(reward)
    except (TypeError, ValueError):
        raise InputError("wrong rewards", field="reward", found=repr(reward), expected=expected) from None
    if given.shape not in ((), (count,)) or not np.isfinite(given).all():
        found = str(given.tolist()) if given.ndim == 0 else f"shape {given.shape}"
        found += "" if np.isfinite(given).all() else ", NaN or Inf among them"
        raise InputError("wrong rewards", field="reward", found=found, expected=expected)
    return np.broadcast_to(given, (count,))


def each_demonstration(prompt: Demonstrations) -> tuple[Demonstration, ...]:
    """The demonstrations of one prompt, 1 to 16 of them.

    Raises:
        InputError: none, or too many; what is no demonstration.
    """
    if not isinstance(prompt, (Trajectory, Sequence)):
        raise InputError(
            "this is not a demonstration",
            field="trajectory",
            found=f"a {type(prompt).__name__}",
            expected="a Trajectory, a pair of observations [T, S] and actions [T, A], or a list of such",
        )
    # A list of two arrays is still taken for what a pair of them is: observations and actions.
    if isinstance(prompt, (Trajectory, tuple)) or not all(isinstance(part, (Trajectory, tuple)) for part in prompt):
        return (prompt,)  # type: ignore[return-value]
    if not 1 <= len(prompt) <= MOST_DEMONSTRATIONS:
        raise InputError(
            "wrong number of demonstrations for one prompt",
            field="trajectory",
            found=len(prompt),
            expected=f"1 to {MOST_DEMONSTRATIONS}",
        )
    return tuple(prompt)


def read_demonstrations(
    prompts: Sequence[Demonstrations],
    spaces: Spaces,
    encoder: TrajectoryEncoderConfig,
    rewards: bool,
    scaling: ActionScaling,
    keys: Sequence[str] = (),
) -> TrajectoryTokens:
    """Prompts of one or more demonstrations as tokens, with their rewards where those are read and all have them.

    Actions beyond the policy's bounds are cut to them, and a warning says how many: an environment that executed them
    did the same, and the policy was trained with none such.

    Raises:
        InputError: no numbers, of another width, too long, or too many for one prompt.
    """
    given = [each_demonstration(prompt) for prompt in prompts]
    shown = [recorded(one, spaces, scaling, keys) for prompt in given for one in prompt]
    _say_what_is_read(shown, encoder, spaces.layout)
    returns = rewards and all(one.rewards is not None for one in shown)
    counts = tuple(map(len, given))
    return make_tokens(shown, encoder, returns=returns, layout=spaces.layout, counts=counts, standing=False)


def recorded(
    one: Demonstration, spaces: Spaces, scaling: ActionScaling, keys: Sequence[str], quiet: bool = False
) -> Recorded:
    """A demonstration as arrays of the policy's widths, actions within ±1, with what is known of its success.

    `quiet`: do not warn of actions beyond their bounds, of one that is read for the second time.

    Raises:
        InputError: no numbers, of another width, or of lengths that do not fit together.
    """
    parts = (one.observations, one.actions) if isinstance(one, Trajectory) else one
    try:
        seen, done = parts
        seen = _joined(seen, spaces.observed_dim, keys) if isinstance(seen, Mapping) else seen
        observations, actions = _numbers(seen), _numbers(done)
    except (TypeError, ValueError) as error:
        raise InputError(
            "the trajectory prompt is not a pair of number arrays",
            field="trajectory",
            found=str(error),
            expected="observations [T, S] and actions [T, A]",
        ) from None
    widths = tuple(part.shape[-1] if part.ndim else 0 for part in (observations, actions))
    if widths != (spaces.observed_dim, spaces.action_dim):
        raise InputError(
            "the trajectory prompt has another width than the policy",
            field="trajectory",
            found=f"observations of {widths[0]} and actions of {widths[1]} numbers",
            expected=f"{spaces.observed_dim} and {spaces.action_dim}",
        )
    if observations.ndim != 2 or actions.ndim != 2 or len(observations) - len(actions) not in (0, 1):
        raise InputError(
            "the trajectory prompt's arrays do not fit together",
            field="trajectory",
            found=f"observations {list(observations.shape)} and actions {list(actions.shape)}",
            expected="observations [T, S] and actions [T, A], or [T + 1, S] with the one after the last action",
        )
    observations = observations[: len(actions)]
    within, beyond = scaling.to_unit(actions)
    if beyond and not quiet:
        _log.warning("actions of %d of %d demonstrated steps are beyond their bounds: cut", beyond, len(actions))
    known: dict[str, Any] = {}
    if isinstance(one, Trajectory):
        rewards = None if one.rewards is None else np.asarray(one.rewards, np.float32)
        known = {"rewards": rewards, "success": one.success, "success_step": one.success_step}
    return Recorded(spaces.episode(observations), within, **known)


def _say_what_is_read(shown: Sequence[Recorded], encoder: TrajectoryEncoderConfig, layout: Layout | None) -> None:
    """Log of how many demonstrations only a part is read, how long it is, and what their ends were found by."""
    read = [(len(one.observations), *read_part(one, encoder, layout, standing=False)) for one in shown]
    cut = [(length, len(part.observations), by) for length, part, by in read if len(part.observations) < length]
    if cut:
        before, after, ends = zip(*cut, strict=True)
        known = ", ".join(sorted({by for by in ends if by != "whole"}))
        why = f"end found by {known}" if known else "without standing still for long"
        words = "%d of %d demonstrations are read in part, %d of %d steps; %s"
        _log.info(words, len(cut), len(shown), sum(after), sum(before), why)
