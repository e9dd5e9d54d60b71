"""Three non-learned baselines: what a policy that is never handed over must beat to have learned anything.

`replay` repeats the demonstration's actions open-loop. `tracker` follows the demonstration's way, translated to where
the object and the goal are now (`llmdpd.policy.tracker`). `retrieve-and-play` takes the action of the
nearest demonstrated state. All take the demonstrations of an evaluation's prompts and read no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.evaluation.episodes import Index, MakeAct, prompt_rows
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.policy.tracker import Follower, Scene, Track
from llmdpd.tasks.simulation.rollout import Act, EpisodeRequest
from llmdpd.tasks.specs import common_spec

FloatArray = NDArray[np.float32]


def replay(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """The demonstration's actions, whatever is observed; after its end its last action.

    Where a layout says what actions are, there is no motion after the end, and the last gripper command.
    """
    demonstrations, rows = _demonstrations(prompts, requests)
    layout = common_spec(list(prompts)).layout

    def after(last: FloatArray) -> FloatArray:
        if layout is None or not layout.move:
            return last
        still, grip = np.zeros_like(last), list(layout.grip)
        still[grip] = last[grip]
        return still

    def act(observations: FloatArray, index: Index, steps: Index, rewards: FloatArray) -> FloatArray:
        done = [demonstrations[row].actions for row in rows[index]]
        pairs = zip(done, steps.tolist(), strict=True)
        return np.stack([own[step] if step < len(own) else after(own[-1]) for own, step in pairs]).astype(np.float32)

    return act


def tracker(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """Proportional control along the demonstration's way, see `llmdpd.policy.tracker`.

    Raises InputError for tasks whose layout does not say how actions move the body, or lacks a goal.
    """
    demonstrations, rows = _demonstrations(prompts, requests)
    spec = common_spec(list(prompts))
    free = [np.inf] * spec.action_dim
    low, high = np.array(spec.action_low or np.negative(free)), np.array(spec.action_high or free)
    bounds = low.astype(np.float32), high.astype(np.float32)
    scene = Scene(spec.layout, *bounds, "--baseline", "use the baseline replay")
    tracks = [Track.of(shown.observations[: len(shown.actions)], shown.actions, scene) for shown in demonstrations]
    followers: dict[int, Follower] = {}

    def act(observations: FloatArray, index: Index, steps: Index, rewards: FloatArray) -> FloatArray:
        actions = np.empty((len(index), spec.action_dim), np.float32)
        for row, (request, step) in enumerate(zip(index.tolist(), steps, strict=True)):
            if step == 0:
                followers[request] = Follower(tracks[rows[request]], scene, observations[row])
            actions[row] = followers[request].act(observations[row])
        return actions

    return act


def retrieve_and_play(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """The action of the demonstrated state that is nearest to what is observed, the earliest of equally near ones.

    Nearest by the Euclidean distance of observations as they are, among all steps of a prompt's demonstrations, several
    of one prompt together included. Source: «Retrieve and Play» of REGENT (arXiv 2412.04759, section 4).
    """
    rows = prompt_rows(prompts, requests)
    shown = [[d] if isinstance(d, Trajectory) else d for d in rows.demonstrations]
    own = [row for row in shown if row]
    if len(own) < len(shown):
        raise _no_demonstration()
    states = [np.concatenate([demonstration.observations for demonstration in row]) for row in own]
    actions = [np.concatenate([demonstration.actions for demonstration in row]) for row in own]

    def act(observations: FloatArray, index: Index, steps: Index, rewards: FloatArray) -> FloatArray:
        chosen = []
        for row, observation in zip(rows.of_request[index], observations, strict=True):
            distances = np.linalg.norm(states[row] - observation, axis=1)
            chosen.append(actions[row][int(distances.argmin())])
        return np.stack(chosen).astype(np.float32)

    return act


BASELINES: dict[str, MakeAct] = {"replay": replay, "tracker": tracker, "retrieve-and-play": retrieve_and_play}
"""Non-learned baselines by name."""


def _demonstrations(
    prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]
) -> tuple[list[Trajectory], Index]:
    rows = prompt_rows(prompts, requests)
    demonstrations = [demonstration for demonstration in rows.demonstrations if isinstance(demonstration, Trajectory)]
    if len(demonstrations) < len(rows.demonstrations):
        raise _no_demonstration()
    return demonstrations, rows.of_request


def _no_demonstration() -> InputError:
    return InputError(
        "a non-learned baseline follows a demonstration", field="--baseline", expected="one of every task"
    )
