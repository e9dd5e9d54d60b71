"""What the C++ code is given of a retrieval context in training: features, waves, what is raw of demonstrations."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.nn.feature_table import feature_tables
from llmdpd.nn.features import StateFeatures
from llmdpd.ops import native
from llmdpd.ops.packing import pack_features
from llmdpd.ops.reading import ContextShape, Seen, Shown
from llmdpd.prompts.demonstration import TrajectoryTokens

Array = NDArray[np.float32]


class _Features(NamedTuple):
    """The tables of features packed, and what they were made of."""

    mean: Array
    std: Array
    isa: str
    packed: Any
    own: int
    geometry: int


_features: weakref.WeakKeyDictionary[nn.Module, _Features] = weakref.WeakKeyDictionary()


def _packed_features(features: StateFeatures) -> _Features:
    """The features with their present statistics."""
    mean, std, isa = native.array(features.mean), native.array(features.std), native.module().active_isa()
    kept = _features.get(features)
    same = kept is not None and kept.isa == isa and np.array_equal(kept.mean, mean) and np.array_equal(kept.std, std)
    if kept is None or not same:
        tables = feature_tables(features)
        packed = pack_features(features.state_dim, *tables)
        kept = _Features(mean.copy(), std.copy(), isa, packed, len(tables.own[0]), len(tables.geometry[0]))
        _features[features] = kept
    return kept


def read_features(
    features: StateFeatures, observations: Array, to: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """What `StateFeatures` makes of observations [N, S] with its present statistics: [N, F], and geometry [N, G].

    to: arrays that they are written to.
    """
    kept, rows = _packed_features(features), len(observations)
    found = to or (_empty(rows, kept.own), _empty(rows, kept.geometry))
    kept.packed.features(observations, *found, native.threads())
    return found


class PromptArrays(NamedTuple):
    """What is known of P prompts of T steps, but for texts: what `Shown` has of them, and `Seen`."""

    features: Array
    geometry: Array
    """Of the steps, [P T, F] and [P T, G]."""
    steps: Array
    embedded: Array | None
    mask: Array
    bias: Array
    step_bias: Array
    waypoint_bias: Array | None
    there: Array | None
    waypoints: Array | None

    def shown(self, text: Array | None, keep_text: Array | None, keep_trajectory: Array | None) -> Shown:
        """With the texts and what is kept."""
        return Shown(text, keep_text, keep_trajectory, self.steps, self.embedded, self.mask, self.bias)


class StateArrays(NamedTuple):
    """What is known of B states: features [B, F], geometry [B, G], and `own` and `here` of `Seen`."""

    features: Array
    geometry: Array
    own: Array
    here: Array


class ContextInputs(NamedTuple):
    """What the arrays of a context are made by.

    shape: its parts. frequencies: of the encoder's positions. periods: of the timestep embedding, None where there is
    none. lookahead: steps ahead whose geometry is looked up. time_unit: time steps that count as one in comparing.
    """

    shape: ContextShape
    features: StateFeatures
    frequencies: Tensor
    periods: Tensor | None
    lookahead: tuple[int, ...]
    time_unit: float

    def new_prompts(self, prompts: int, steps: int) -> PromptArrays:
        """Arrays to be written by `write_prompts`; what stands for the step that says nothing is written."""
        packed, rows, actions = _packed_features(self.features), prompts * steps, self.shape.action_dim
        compared, read = packed.geometry + self._timed, packed.own + actions + 2 * len(self.frequencies)
        far = actions + packed.geometry * len(self.lookahead)
        padded, waypoints = (prompts, steps + 1), self.shape.waypoints
        return PromptArrays(
            features=_empty(rows, packed.own),
            geometry=_empty(rows, packed.geometry),
            steps=_empty(rows, read),
            embedded=None if self.periods is None else _empty(rows, 2 * len(self.periods)),
            mask=_empty(prompts, steps),
            bias=_empty(prompts, steps),
            step_bias=np.zeros(padded, np.float32),
            waypoint_bias=_empty(*padded) if waypoints else None,
            there=np.zeros((*padded, compared), np.float32) if self.shape.similarity else None,
            waypoints=np.zeros((*padded, far), np.float32) if waypoints else None,
        )

    def new_states(self, states: int) -> StateArrays:
        """Arrays to be written by `write_states`."""
        packed = _packed_features(self.features)
        own = packed.own + (0 if self.periods is None else 2 * len(self.periods))
        sizes = (packed.own, packed.geometry, own, packed.geometry + self._timed)
        return StateArrays(*(_empty(states, size) for size in sizes))

    def write_prompts(self, tokens: TrajectoryTokens, given: Tensor | None, to: PromptArrays) -> None:
        """Write what is known of P prompts of one demonstration each; given [P, 1]: see `Keep`."""
        rows, mask = len(to.steps), tokens.mask.numpy()
        actions, times = native.array(tokens.actions), native.array(tokens.times.float())
        states = native.array(tokens.states).reshape(rows, -1)
        read_features(self.features, states, (to.features, to.geometry))
        waves = waves_of(native.array(tokens.phase)[..., None] * native.array(self.frequencies))
        np.concatenate([to.features, actions.reshape(rows, -1), waves.reshape(rows, -1)], 1, out=to.steps)
        if to.embedded is not None:
            to.embedded[:] = self._embedded(times).reshape(rows, -1)
        to.mask[:] = mask
        to.bias[:] = _bias(mask)
        usable = mask if given is None else mask & (native.array(given.float()) > 0)
        to.step_bias[:, :-1] = _bias(usable)
        geometry = to.geometry.reshape(*mask.shape, -1)
        if to.there is not None:
            to.there[:, :-1, : geometry.shape[-1]] = geometry
            if self._timed:
                to.there[:, :-1, -1] = times / np.float32(self.time_unit)
        if to.waypoints is not None and to.waypoint_bias is not None:
            # The last step is for prompts without a demonstration: heads that may ignore it would end up ignoring it.
            to.waypoint_bias[:, :-1], to.waypoint_bias[:, -1] = to.step_bias[:, :-1], _bias(~usable.any(1))
            self._write_waypoints(mask, actions, geometry, to.waypoints[:, :-1])

    def write_states(self, observations: Tensor, time: Tensor, to: StateArrays) -> None:
        """Write what is known of states [B, S] at time steps [B]."""
        times, timed = native.array(time.float()), self.periods is not None
        read_features(self.features, native.array(observations), (to.features, to.geometry))
        np.concatenate([to.features, self._embedded(times)] if timed else [to.features], 1, out=to.own)
        place = times[:, None] / np.float32(self.time_unit)
        np.concatenate([to.geometry, place] if timed else [to.geometry], 1, out=to.here)

    @property
    def _timed(self) -> bool:
        return self.periods is not None

    def _embedded(self, times: Array) -> Array:
        assert self.periods is not None
        return waves_of(np.float32(2 * math.pi) * times[..., None] / native.array(self.periods))

    def _write_waypoints(self, mask: NDArray[np.bool_], actions: Array, geometry: Array, to: Array) -> None:
        """The raw values [P, T, A + L G]: past the demonstration's end its last step stands, where it went."""
        own, far = actions.shape[-1], geometry.shape[-1]
        last = np.maximum(mask.sum(1) - 1, 0)[:, None]
        place, prompt = np.arange(mask.shape[1]), np.arange(len(mask))[:, None]
        to[..., :own] = actions
        for number, ahead in enumerate(self.lookahead):
            to[..., own + number * far : own + (number + 1) * far] = geometry[prompt, np.minimum(place + ahead, last)]


def waves_of(angles: Array) -> Array:
    """Sines and cosines of angles [..., N], side by side: [..., 2 N]."""
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def seen(prompts: PromptArrays, states: StateArrays) -> Seen:
    """States under prompts."""
    raw = (prompts.step_bias, prompts.waypoint_bias, prompts.there, prompts.waypoints)
    return Seen(states.own, states.here, *raw)


def _empty(*shape: int) -> Array:
    return np.empty(shape, np.float32)


def _bias(mask: Any) -> Array:
    """0 where the mask holds and -inf elsewhere."""
    return np.where(mask, np.float32(0), np.float32(-np.inf))
