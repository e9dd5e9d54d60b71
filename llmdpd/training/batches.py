"""Batches of transitions under prompts, drawn from the training data."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmdpd.data import TrajectoryDataset
from llmdpd.data.augmentation import Augmentation, AugmentationConfig
from llmdpd.data.columns import expect_single_rows, take
from llmdpd.errors import InputError
from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.nn.context import Keep
from llmdpd.prompts.demonstration import (
    TrajectoryEncoderConfig,
    TrajectoryTokens,
    choose_steps,
    part_tokens,
    read_part,
    timed,
)
from llmdpd.prompts.useful_part import Recorded
from llmdpd.tasks.layout import Layout
from llmdpd.training.device_data import DeviceData, device_data
from llmdpd.utils.sharding import Share

# What CUDA's own allocator aligns to: kernels may go by it.
_ALIGNMENT = 256
_MANY = 4096  # tasks
_KEPT = 1 << 16  # episodes whose shown part is kept: 600 bytes each, beside what they are views of
_DEMONSTRATION_SHARE = 0.1  # of the episodes, the best ones


class BatchSampler:
    """Draws the batches of Algorithm 1 (lines 2 to 4): tasks, their prompts, their transitions.

    Each prompt of a batch is of one task: its text, and a random episode of it, or of the task that shows it, that did
    not fail, or where success is not recorded one of the tenth with the highest returns. Tasks differ as far as there
    are enough of them; beyond, they come again with another demonstration.

    Args:
        dataset: the seen tasks' data.
        embeddings: LLM embeddings [tasks, D] of the data set's tasks, in its order; None where text is off.
        encoder: how prompts are cut; None where trajectory prompts are off.
        batch_size: transitions a batch, a multiple of `prompts`.
        prompts: P, prompts a batch.
        seed: of the draws.
        device: where batches go.
        augmentation: of states and demonstrations together, by their layout; None for none.
        dropout: rates at which a prompt's text and its demonstration are left out.
        horizon: steps of the windows that each batch carries; 0 for none.
        before: steps of the windows before their transition, on top.
        layout: what the numbers of observations are, for where demonstrations end (`llmdpd.prompts.useful_part`).
        self_prompted: probability that a prompt's transitions are those of its demonstration (`OfflineConfig`); never
            of a task that another one shows, whose demonstrations do something else.
        shown_by: the task of the data set whose episodes show a task, by task; one that is not named shows itself.
        replayed: tasks of the data set that are learned beside the others, which were learned before.
        replay: share of the prompts that are of those, on average.
        share: the part of each batch that this process learns from; None for all. The draws are those of the whole.

    Raises:
        InputError: prompts that do not share the batch out evenly; a task without an episode that can be shown, or
            whose demonstrations are of a task that the data set does not have.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        embeddings: Tensor | None,
        encoder: TrajectoryEncoderConfig | None,
        batch_size: int,
        prompts: int,
        seed: int,
        device: torch.device,
        augmentation: tuple[AugmentationConfig, Layout] | None = None,
        dropout: tuple[float, float] = (0.0, 0.0),
        horizon: int = 0,
        before: int = 0,
        layout: Layout | None = None,
        self_prompted: float = 0.0,
        shown_by: Mapping[str, str] | None = None,
        replayed: Collection[str] = (),
        replay: float = 0.0,
        share: Share | None = None,
    ) -> None:
        if prompts < 1 or batch_size < 1 or batch_size % prompts:
            raise InputError(
                "the batch cannot be shared out evenly among the prompts",
                field="batch_size",
                found=batch_size,
                expected=f"a multiple of {prompts} (prompts_per_batch)",
            )
        self._dataset, self._encoder, self._device = dataset, encoder, device
        expect_single_rows(dataset.observations)
        self._horizon, self._before = horizon, before
        self._returns = dataset.returns_to_go() if horizon else None
        self._embeddings = None if embeddings is None else embeddings.cpu()
        self._prompts, self._share = prompts, batch_size // prompts
        self._random = np.random.default_rng(seed)
        self._transitions = [_Transitions(dataset, dataset.episodes_of(task)) for task in dataset.tasks]
        # Where no demonstrations are read, it doesn't matter whose they would be.
        others = shown_by or {} if encoder is not None else {}
        shown = [self._present(task, others.get(task, task)) for task in dataset.tasks]
        self._demonstrations = [self._eligible(task) for task in shown]
        self._shows_itself = [other == task for task, other in zip(dataset.tasks, shown, strict=True)]
        self._augmentation, self._dropout, self._layout = augmentation, dropout, layout
        self._self_prompted, self._part_of = self_prompted, share
        # Of data in memory parts are views. Those of data on the disk would be copies, of any number of episodes.
        self._shown_part = lru_cache(maxsize=0 if dataset.stored else _KEPT)(
            partial(_shown_part, dataset, encoder, layout)
        )
        # Windows are of the host's memory, and so is what processes share.
        changed = None if augmentation is None or encoder is None else augmentation[1]
        self._on_device = None if horizon or share is not None else device_data(dataset, device, changed)
        old = np.array([task in replayed for task in dataset.tasks])
        self._new, self._replayed, self._replay = np.flatnonzero(~old), np.flatnonzero(old), replay

    def with_seed(self, seed: int) -> BatchSampler:
        """Batches of the same data, which is not copied, by draws of another seed, from their beginning on."""
        other = copy.copy(self)
        other._random = np.random.default_rng(seed)
        return other

    def next(self) -> PromptedBatch:
        """The next batch."""
        tasks = self._tasks()
        parts = [self._transitions_under(task) for task in tasks]
        rows = np.concatenate([own for own, _ in parts])
        if self._on_device is not None:
            return self._gathered_there(self._on_device, tasks, rows, [own for _, own in parts])
        if self._part_of is not None:
            rows = rows[self._part_of.rows.own.numpy()]
        batch = self._dataset.gather(rows)
        tokens = None
        if self._encoder is not None:
            drawn = zip(tasks, (demonstration for _, demonstration in parts), strict=True)
            shown = [self._shown_part(self._demonstration(task) if own is None else own) for task, own in drawn]
            tokens = part_tokens(shown, self._encoder, self._random, returns=self._horizon > 0)
        arrays: dict[str, Any] = {
            name: None if part is None else torch.from_numpy(part) for name, part in batch._asdict().items()
        }
        prompted = PromptedBatch(
            **arrays,
            text=None if self._embeddings is None else self._embeddings[torch.from_numpy(tasks)],
            tokens=tokens,
            keep=self._keep(),
            windows=self._windows(rows) if self._horizon else None,
        )
        augmentation = None if tokens is None else self._draw_augmentation(tokens.mask.shape[1], prompted.keep)
        if self._part_of is not None:
            prompted = prompted.with_prompts(self._part_of.prompts)
        if augmentation is not None:
            prompted = _augmented(prompted, augmentation)
        return prompted if self._device.type == "cpu" else moved(prompted, self._device)

    def _gathered_there(
        self, data: DeviceData, tasks: np.ndarray, rows: np.ndarray, alone: Sequence[int | None]
    ) -> PromptedBatch:
        """The batch of these transitions, by the same draws, from data on the device.

        alone: of each prompt the episode that its transitions are of, where they are its demonstration's own.
        """
        dataset, encoder = self._dataset, self._encoder
        few: dict[str, Any] = {"rows": rows, "timesteps": rows - dataset.offsets[dataset.episode_ids(rows)]}
        padded = False
        if encoder is not None:
            episodes = [
                self._demonstration(task) if own is None else own for task, own in zip(tasks, alone, strict=True)
            ]
            shown = [self._shown_part(episode) for episode in episodes]
            chosen = [choose_steps(len(part.observations), encoder, self._random) for part in shown]
            few |= dict(zip(("tokens.phase", "tokens.times", "tokens.mask"), timed(chosen, shown), strict=True))
            few["shown"] = steps = np.full(few["tokens.mask"].shape, -1)
            for place, episode, index in zip(steps, episodes, chosen, strict=True):
                place[: len(index)] = dataset.offsets[episode] + index
            padded = bool((steps < 0).any())
        keep = self._keep()
        few |= {"keep.text": keep.text, "keep.trajectory": keep.trajectory}
        if self._embeddings is not None:
            few["text"] = self._embeddings[torch.from_numpy(tasks)]
        change = None if encoder is None else self._draw_augmentation(few["shown"].shape[1], keep)
        changes = {} if change is None else change.numbers()
        given = {name: torch.as_tensor(part) for name, part in (few | changes).items() if part is not None}
        there = moved_together(given, self._device)
        numbers = {name: there.pop(name) for name in changes}
        found = data.gather(
            there.pop("rows"), there.pop("shown", None), self._prompts, None if change is None else numbers
        )
        return _placed(there | found, padded)

    def _tasks(self) -> np.ndarray:
        """The tasks of the batch's prompts [P], by number."""
        if not self._replay:
            return self._rounds(self._new, self._prompts)
        # On average the share itself, where no whole number of prompts is.
        old = min(int(self._replay * self._prompts + self._random.random()), self._prompts)
        return np.concatenate([self._rounds(self._new, self._prompts - old), self._rounds(self._replayed, old)])

    def _rounds(self, tasks: np.ndarray, count: int) -> np.ndarray:
        """So many of the tasks, each as often as the others or once more, in random order."""
        if len(tasks) > _MANY and count <= len(tasks):  # without putting all of them in order, for a batch of twelve
            return tasks[self._random.choice(len(tasks), count, replace=False)]
        rounds = [self._random.permutation(len(tasks)) for _ in range(-(-count // len(tasks)))]
        return tasks[np.concatenate([*rounds, np.empty(0, np.int64)])[:count]]

    def _transitions_under(self, task: int) -> tuple[np.ndarray, int | None]:
        """Transitions under one prompt of a task; where they are its demonstration's own, that episode beside them."""
        alone = self._self_prompted and self._shows_itself[task]
        if not alone or self._random.random() >= self._self_prompted:
            return self._draw(self._transitions[task], self._share), None
        episode, offsets = self._demonstration(task), self._dataset.offsets
        return self._random.integers(offsets[episode], offsets[episode + 1], size=self._share), episode

    def _demonstration(self, task: int) -> int:
        return int(self._draw(self._demonstrations[task], 1)[0])

    def _keep(self) -> Keep:
        def draw(rate: float) -> Tensor | None:
            if rate == 0:
                return None
            return torch.from_numpy(self._random.random((self._prompts, 1), np.float32) >= rate).float()

        return Keep(*map(draw, self._dropout))

    def _draw_augmentation(self, steps: int, keep: Keep) -> Augmentation | None:
        """Sample the changes of all prompts of the whole batch, of so many steps; keep those of this process's."""
        if self._augmentation is None:
            return None
        own = None if self._part_of is None else self._part_of.prompts.own.numpy()
        config, layout = self._augmentation
        shown = steps, self._dataset.action_dim
        return Augmentation(config, layout, self._prompts, self._random, keep.trajectory, shown=shown, own=own)

    def state(self) -> dict[str, Any]:
        """The position in the stream of draws, as JSON values."""
        return dict(self._random.bit_generator.state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state()` was taken."""
        self._random.bit_generator.state = state

    def _windows(self, rows: np.ndarray) -> StepWindows:
        dataset = self._dataset
        assert self._returns is not None, "there is a horizon"
        index, mask = dataset.windows(rows, self._horizon, self._before)
        episodes = np.repeat(dataset.episode_ids(rows), index.shape[1])
        numbers = {name: getattr(dataset, name) for name in ("observations", "actions", "expert_actions")}
        states, actions, expert = (
            None if part is None else torch.from_numpy(part.reshape(*index.shape, -1))
            for part in take(numbers, index.reshape(-1), episodes).values()
        )
        assert states is not None, "every data set has them"
        assert actions is not None, "every data set has them"
        return StepWindows(
            states=states,
            actions=actions,
            expert_actions=expert,
            mask=torch.from_numpy(mask),
            returns=torch.from_numpy(self._returns[index]),
        )

    def _present(self, task: str, shown: str) -> str:
        """The task `shown`, whose demonstrations show `task`, if the data have it."""
        if shown != task and shown not in self._dataset.tasks:
            raise InputError(
                f"the data lack the task whose demonstrations show {task}",
                path=self._dataset.source,
                field=task,
                found=", ".join(self._dataset.tasks),
                expected=f"{shown} beside {task}",
                hint=f"train on {shown} too, or leave {task} out",
            )
        return shown

    def _eligible(self, task: str) -> np.ndarray:
        episodes = self._dataset.episodes_of(task)
        good = episodes[self._dataset.successes[episodes] != 0]
        if not len(good):
            found = f"0 of {len(episodes)} episodes succeeded"
            problem = "no episode of the task can serve as a demonstration: all failed"
            raise InputError(problem, path=self._dataset.source, field=task, found=found, expected="at least 1")
        if (self._dataset.successes[good] == 1).any():
            return good
        # Where success is not known the highest returns stand in: most of a replay buffer shows how not to do it.
        best = np.argsort(-self._dataset.returns()[good], kind="stable")
        return np.sort(good[best[: math.ceil(_DEMONSTRATION_SHARE * len(good))]])

    def _draw(self, pool: np.ndarray | _Transitions, count: int) -> np.ndarray:
        return pool[self._random.integers(len(pool), size=count)]


def _shown_part(
    dataset: TrajectoryDataset, encoder: TrajectoryEncoderConfig | None, layout: Layout | None, episode: int
) -> Recorded:
    """What prompts show of an episode."""
    assert encoder is not None, "there are demonstrations"
    e = dataset.episode(episode)
    recorded = Recorded(e.observations, e.actions, e.rewards, e.success, e.success_step)
    return read_part(recorded, encoder, layout)[0]


def _augmented(batch: PromptedBatch, change: Augmentation) -> PromptedBatch:
    """The batch with each prompt's change applied to everything that belongs to the prompt."""
    tokens, windows = batch.tokens, batch.windows
    assert tokens is not None, "else nothing is changed"
    prompts = len(tokens.mask)

    def changed(by: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        """A part [B, …] of the transitions, each row under the change of its prompt."""
        return by(part.reshape(prompts, -1, part.shape[-1])).reshape(part.shape)

    def actions(of: PromptedBatch | StepWindows) -> dict[str, Any]:
        expert = None if of.expert_actions is None else changed(change.actions, of.expert_actions)
        return {"actions": changed(change.actions, of.actions), "expert_actions": expert}

    if windows is not None:
        windows = dataclasses.replace(windows, states=changed(change.states, windows.states), **actions(windows))
    return dataclasses.replace(
        batch,
        observations=changed(change.states, batch.observations),
        next_observations=changed(change.states, batch.next_observations),
        **actions(batch),
        tokens=dataclasses.replace(
            tokens, states=change.states(tokens.states), actions=change.demonstration_actions(tokens.actions)
        ),
        windows=windows,
    )


class _Transitions:
    """The transitions of some episodes, one after the other, without a list of them: pool[numbers] are their rows."""

    def __init__(self, dataset: TrajectoryDataset, episodes: np.ndarray) -> None:
        lengths = dataset.offsets[episodes + 1] - dataset.offsets[episodes]
        self._ends = np.cumsum(lengths)
        self._shift = dataset.offsets[episodes] - (self._ends - lengths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        rows: np.ndarray = numbers + self._shift[np.searchsorted(self._ends, numbers, side="right")]
        return rows


def moved(batch: PromptedBatch, device: torch.device) -> PromptedBatch:
    """The batch on the device, by one copy of all its tensors together, which nobody waits for.

    The memory that is copied from is page-locked and torch's: it is not used again before the copy is done.
    """
    return batch.with_tensors(moved_together(batch.tensors(), device))


def moved_together(given: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors on the device, as `moved` moves a batch's."""
    tensors = {name: tensor.contiguous() for name, tensor in given.items()}
    starts, total = {}, 0
    for name, tensor in tensors.items():
        starts[name] = total
        total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    here = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for name, part in _parts(here, tensors, starts).items():
        part.copy_(tensors[name])
    return _parts(here.to(device, non_blocking=True), tensors, starts)


def _placed(tensors: Mapping[str, Tensor], padded: bool) -> PromptedBatch:
    """The batch of tensors by their places in it; `padded`: see `TrajectoryTokens`."""
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "expert_actions", "timesteps")
    tokens = None
    if "tokens.mask" in tensors:
        of_steps: dict[str, Any] = {
            name: tensors[f"tokens.{name}"] for name in ("states", "actions", "phase", "times", "mask")
        }
        tokens = TrajectoryTokens(**of_steps, padded=padded)
    keep = Keep(tensors.get("keep.text"), tensors.get("keep.trajectory"))
    parts: dict[str, Any] = {name: tensors.get(name) for name in names}
    return PromptedBatch(**parts, text=tensors.get("text"), tokens=tokens, keep=keep)


def _parts(whole: Tensor, like: Mapping[str, Tensor], starts: Mapping[str, int]) -> dict[str, Tensor]:
    """Views of these shapes and dtypes into bytes, each from its start on."""
    typed = {dtype: whole.view(dtype) for dtype in {tensor.dtype for tensor in like.values()}}
    return {
        name: typed[t.dtype].as_strided(t.shape, t.stride(), starts[name] // t.itemsize) for name, t in like.items()
    }
