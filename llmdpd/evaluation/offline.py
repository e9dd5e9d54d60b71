"""Evaluation without an environment: how near a policy's actions come to those of recorded episodes.

Nothing is rolled out. Episodes that were not learned from are walked through, step by step as they were recorded, and
at every step the policy names an action under the task's own prompts, under another task's, and under none. A policy
that comes as near under another task's prompts has not read its own. An error is no success rate: it chooses between
checkpoints, and says whether prompts are read.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmdpd.data import Trajectory, TrajectoryDataset, join_datasets
from llmdpd.errors import InputError
from llmdpd.evaluation.episodes import policy_act, prompt_rows
from llmdpd.evaluation.prompts import TaskPrompt, choose_demonstrations, swap_prompts
from llmdpd.evaluation.results import Checkpoint, TaskResult
from llmdpd.evaluation.scoring import policy_record
from llmdpd.nn.policy_network import States
from llmdpd.policy.policy import Policy
from llmdpd.tasks.simulation.rollout import EpisodeRequest
from llmdpd.tasks.specs import shown_tasks
from llmdpd.utils import ranks
from llmdpd.utils.progress import Stopwatch, console

HELD_OUT = 0.1
"""The share of each task's episodes that is not learned from, and judged by."""
_MOST = 50
_STATES_AT_ONCE = 4096
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class OfflineData:
    """What a run without an environment learns from, what it is prompted with, and what it is judged by.

    learned: the seen tasks' data, but for the episodes held out. demonstrations: what each task's prompt is chosen
    from, none of them held out. held_out: recorded episodes of every task, by task.
    """

    learned: TrajectoryDataset
    demonstrations: TrajectoryDataset | None
    held_out: Mapping[str, Sequence[Trajectory]]


@dataclass(frozen=True)
class OfflineScore:
    """How near the actions at the steps of one task's episodes came to the recorded ones.

    action_error: mean over steps and numbers of |action - recorded|, as a share of the number's range. action_errors:
    the mean of each number by itself [A], in its own unit. diffusion_loss: mean squared error of the predicted noise
    at fixed noise, over all K levels; None of a policy that is no diffusion of single actions. steps: that it is the
    mean of.
    """

    action_error: float
    action_errors: tuple[float, ...]
    diffusion_loss: float | None
    steps: int


def hold_out(
    dataset: TrajectoryDataset,
    demonstrations: TrajectoryDataset | None,
    tasks: Sequence[str],
    seed: int,
    *,
    keep_failed: bool = False,
) -> OfflineData:
    """Split data for an evaluation without an environment.

    Of each task of `dataset` a tenth of the episodes, drawn by seed and the task's name, at least one and at most 50,
    is held out. Of the other `tasks`, which are not learned from, all episodes of `demonstrations` are but the one that
    serves as demonstration, theirs or of a task that they show (at most 50), and where it alone is known none. Episodes
    that failed are not among these, as they are left out of what is learned from, unless `keep_failed`.

    Raises:
        InputError: a task of the data set with fewer than two episodes.
    """
    kept, held = [], {}
    for task in dataset.tasks:
        episodes = np.random.default_rng([seed, zlib.crc32(task.encode())]).permutation(dataset.episodes_of(task))
        if len(episodes) < 2:
            raise InputError(
                "a task has no episode to spare for an evaluation without an environment",
                path=dataset.source,
                field=task,
                found=f"{len(episodes)} episode",
                expected="two or more",
                hint="record more of it, or leave it out; --evaluation none evaluates nothing",
            )
        count = min(_MOST, max(1, math.floor(HELD_OUT * len(episodes))))
        held[task] = [dataset.episode(int(episode)) for episode in np.sort(episodes[:count])]
        kept.append(episodes[count:])
    learned = dataset.select(np.sort(np.concatenate(kept)))
    if demonstrations is None:
        return OfflineData(learned, None, held)
    shown = [learned]
    others = [task for task in tasks if task not in dataset.tasks]
    showing = [task for task in shown_tasks(others) if task not in dataset.tasks]
    chosen = {task: choose_demonstrations(demonstrations, task)[0] for task in showing}
    for task in others:
        own = [int(episode) for episode in demonstrations.episodes_of(task) if episode != chosen.get(task)]
        rest = [episode for episode in own if keep_failed or demonstrations.successes[episode] != 0]
        held[task] = [demonstrations.episode(episode) for episode in rest[:_MOST]]
    shown += [demonstrations.select([episode]).select_tasks([task]) for task, episode in chosen.items()]
    return OfflineData(learned, _joined(shown), {task: episodes for task, episodes in held.items() if episodes})


def prompt_variants(
    prompts: Mapping[str, TaskPrompt], seen: Sequence[str], policy: Policy
) -> list[Mapping[str, TaskPrompt]]:
    """The tasks with their own prompts; with another task's, of tasks with another in their split; and with none.

    None at all only of a policy that prompt dropout taught to do without; no variant of one that reads no prompts.
    """
    reads = policy.network.reads
    if not (reads.text or reads.trajectory):
        return [prompts]
    variants: list[Mapping[str, TaskPrompt]] = [prompts]
    splits = [[task for task in prompts if (task in seen) is split] for split in (True, False)]
    shared = {task: prompts[task] for split in splits if len(split) > 1 for task in split}
    if shared:
        variants.append(swap_prompts(shared, seen))
    if all(dropout > 0 for read, dropout in _dropouts(reads) if read):
        variants.append(
            {task: dataclasses.replace(prompt, text=None, demonstrations=()) for task, prompt in prompts.items()}
        )
    return variants


def score_offline(
    policy: Policy,
    prompts: Mapping[str, TaskPrompt],
    episodes: Mapping[str, Sequence[Trajectory]],
    check: Callable[[], None] = lambda: None,
) -> dict[str, OfflineScore]:
    """How near the policy's actions under these prompts come to those of recorded episodes, by task.

    Its noise depends on the task, the episode's number and the time step alone. `check` is called after every step of
    the episodes and may raise to stop.

    Several processes (`llmdpd.utils.ranks`) judge their share of the tasks each.

    Raises:
        InputError: a prompt that the policy needs and does not get; see `Policy.encode_prompts`.
    """
    judged = [task for task in prompts if episodes.get(task, ())]
    own = {task: prompts[task] for task in ranks.own_share(judged)}
    parts = ranks.together(lambda: [dataclasses.astuple(score) for score in _scores(policy, own, episodes, check)])
    scores = (OfflineScore(error, tuple(errors), *rest) for error, errors, *rest in ranks.interleaved(parts))
    return dict(zip(judged, scores, strict=True))


def _scores(
    policy: Policy,
    prompts: Mapping[str, TaskPrompt],
    episodes: Mapping[str, Sequence[Trajectory]],
    check: Callable[[], None],
) -> list[OfflineScore]:
    """The scores of these tasks, in their order."""
    flat = [(task, episode) for task in prompts for episode in episodes.get(task, ())]
    requests = [EpisodeRequest(task, number, len(episode)) for number, (task, episode) in enumerate(flat)]
    if not flat:
        return []
    shown = {task: prompts[task] for task in dict.fromkeys(task for task, _ in flat)}
    # Recorded episodes may pause or be slow; what is judged is what the policy itself would do there.
    act = policy_act(policy, shown, requests, hands_over=False)
    lengths = np.array([len(episode) for _, episode in flat])
    acted = [np.empty_like(episode.actions) for _, episode in flat]
    for step in range(int(lengths.max())):
        rows = np.flatnonzero(lengths > step)
        observations = np.stack([flat[row][1].observations[step] for row in rows])
        rewards = np.array([flat[row][1].rewards[step - 1] if step else 0.0 for row in rows], np.float32)
        actions = np.asarray(act(observations, rows, np.full(len(rows), step), rewards))
        for row, action in zip(rows, actions, strict=True):
            acted[row][step] = action
        check()
    losses = _diffusion_losses(policy, shown, requests, [episode for _, episode in flat])
    scores = []
    for task in shown:
        mine = [number for number, (own, _) in enumerate(flat) if own == task]
        score = _score(policy, [acted[n] for n in mine], [flat[n][1].actions for n in mine])
        if losses is not None:
            mean = float(np.concatenate([losses[n] for n in mine]).mean())
            score = dataclasses.replace(score, diffusion_loss=mean)
        scores.append(score)
    return scores


def offline_results(
    policies: Mapping[Checkpoint, Policy],
    prompts: Mapping[str, TaskPrompt],
    episodes: Mapping[str, Sequence[Trajectory]],
    check: Callable[[], None] = lambda: None,
) -> list[TaskResult]:
    """Judge policies, by the name of their checkpoint, on recorded episodes of all tasks, under all `prompt_variants`.

    `check` is called now and then and may raise to stop.
    """
    console.print("nothing is rolled out: policies are judged by the error of their actions on recorded episodes")
    records: list[TaskResult] = []
    for name, policy in policies.items():
        metadata, seen = policy.metadata, policy.metadata["trained_on"]
        if any(record.iterations == metadata["iterations"] for record in records):
            # The same networks on the same episodes.
            records += [dataclasses.replace(record, checkpoint=name) for record in records]
            continue
        for variant in prompt_variants(prompts, seen, policy):
            watch = Stopwatch()
            scores = score_offline(policy, variant, episodes, check)
            seconds = watch.seconds / max(sum(score.steps for score in scores.values()), 1)
            for task, score in scores.items():
                measured = {
                    **{"task": task, "split": "seen" if task in seen else "unseen", "protocol": metadata["protocol"]},
                    **{"episodes": len(episodes[task]), "max_steps": max(map(len, episodes[task]))},
                    **{"goal_visible": metadata["goal_visible"], "wall_seconds": round(seconds * score.steps, 2)},
                    **{field: getattr(score, field) for field in ("action_error", "action_errors", "diffusion_loss")},
                }
                records.append(policy_record(policy, name, variant[task], hands_over=False, **measured))
    return records


def offline_selection(scores: Mapping[str, OfflineScore]) -> tuple[dict[str, float], float]:
    """What a selection during training records, and the score that the best checkpoint is chosen by.

    That is how small the mean over the tasks of the action's error is.
    """
    errors = {task: score.action_error for task, score in scores.items()}
    mean = sum(errors.values()) / len(errors)
    return {
        "eval/seen_action_error": mean,
        **{f"eval/{task}_action_error": error for task, error in errors.items()},
    }, -mean


def _score(policy: Policy, acted: Sequence[FloatArray], recorded: Sequence[FloatArray]) -> OfflineScore:
    done, shown = np.concatenate(acted), np.concatenate(recorded)
    scaling = policy.network.action_scaling
    # Within ±1 the range is 2.
    share = np.abs(scaling.to_unit(done)[0] - scaling.to_unit(shown)[0]).mean() / 2
    errors = np.abs(done - shown).mean(0, dtype=np.float64)
    return OfflineScore(float(share), tuple(float(error) for error in errors), None, len(done))


def _diffusion_losses(
    policy: Policy,
    prompts: Mapping[str, TaskPrompt],
    requests: Sequence[EpisodeRequest],
    episodes: Sequence[Trajectory],
) -> list[NDArray[np.float32]] | None:
    """The loss at each step of each episode; None of a policy without such a loss."""
    network, reads = policy.network, policy.network.reads
    rows = prompt_rows(prompts, requests)
    encoded = policy.encode_prompts(
        [text if reads.text else None for text in rows.texts],
        [demonstration if reads.trajectory else None for demonstration in rows.demonstrations],
    )
    losses: list[NDArray[np.float32]] = []
    for number, episode in enumerate(episodes):
        parts, observations = [], network.spaces.episode(episode.observations)
        for start in range(0, len(episode), _STATES_AT_ONCE):
            part = slice(start, min(start + _STATES_AT_ONCE, len(episode)))
            states = torch.from_numpy(observations[part]).to(policy.device)
            steps = torch.arange(part.start, part.stop, device=policy.device)
            index = torch.full_like(steps, int(rows.of_request[number]))
            actions = torch.from_numpy(network.action_scaling.to_unit(episode.actions[part])[0]).to(policy.device)
            with torch.no_grad():
                loss = network.diffusion_loss(States(states, index, steps), encoded, actions, steps)
            if loss is None:
                return None
            parts.append(loss.cpu().numpy())
        losses.append(np.concatenate(parts))
    return losses


def _dropouts(reads: Any) -> list[tuple[bool, float]]:
    return [(reads.text, reads.text_dropout), (reads.trajectory, reads.trajectory_dropout)]


def _joined(parts: Sequence[TrajectoryDataset]) -> TrajectoryDataset:
    """Data sets as one; what only some of them have, and no prompt is made of, is left out."""
    plain = [dataclasses.replace(part, expert_actions=None) for part in parts]
    return join_datasets(plain)
