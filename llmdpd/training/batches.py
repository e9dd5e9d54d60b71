"""Batches of transitions under prompts, drawn from the training data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmdpd.agents.batch import PromptedBatch
from llmdpd.data import TrajectoryDataset
from llmdpd.errors import InputError
from llmdpd.prompts.trajectory import TrajectoryEncoderConfig, make_tokens

# What CUDA's own allocator aligns to: kernels may go by it.
_ALIGNMENT = 256


class BatchSampler:
    """Draws the batches of Algorithm 1 (lines 2 to 4): tasks, their prompts, their transitions.

    Each task of a batch is under one trajectory prompt, a random episode of that task that did not fail.

    Args:
        dataset: the seen tasks' data.
        embeddings: LLM embeddings [tasks, D] of the data set's tasks, in its order; None where text is off.
        encoder: how prompts are cut; None where trajectory prompts are off.
        batch_size: transitions a batch, a multiple of `tasks_per_batch`.
        tasks_per_batch: tasks a batch.
        seed: of the draws.
        device: where batches go.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        embeddings: Tensor | None,
        encoder: TrajectoryEncoderConfig | None,
        batch_size: int,
        tasks_per_batch: int,
        seed: int,
        device: torch.device,
    ) -> None:
        check_batch(batch_size, tasks_per_batch, len(dataset.tasks))
        self._dataset, self._encoder, self._device = dataset, encoder, device
        self._embeddings = None if embeddings is None else embeddings.cpu()
        self._tasks, self._share = tasks_per_batch, batch_size // tasks_per_batch
        self._random = np.random.default_rng(seed)
        self._transitions = [dataset.transitions_of(task) for task in dataset.tasks]
        self._examples = [self._eligible(task) for task in dataset.tasks]
        self._index = torch.arange(tasks_per_batch).repeat_interleave(self._share)

    def next(self) -> PromptedBatch:
        """The next batch."""
        tasks = self._random.choice(len(self._transitions), self._tasks, replace=False)
        rows = np.concatenate([self._draw(self._transitions[task], self._share) for task in tasks])
        batch = self._dataset.gather(rows)
        tokens = None
        if self._encoder is not None:
            examples = [self._dataset.episode(int(self._draw(self._examples[task], 1)[0])) for task in tasks]
            tokens = make_tokens([(e.observations, e.actions) for e in examples], self._encoder, self._random)
        expert = batch.expert_actions
        prompted = PromptedBatch(
            observations=torch.from_numpy(batch.observations),
            actions=torch.from_numpy(batch.actions),
            rewards=torch.from_numpy(batch.rewards),
            next_observations=torch.from_numpy(batch.next_observations),
            terminals=torch.from_numpy(batch.terminals),
            expert_actions=None if expert is None else torch.from_numpy(expert),
            timesteps=torch.from_numpy(batch.timesteps),
            prompt_index=None if self._tasks == 1 else self._index,
            text=None if self._embeddings is None else self._embeddings[torch.from_numpy(tasks)],
            tokens=tokens,
        )
        return prompted if self._device.type == "cpu" else moved(prompted, self._device)

    def state(self) -> dict[str, Any]:
        """The position in the stream of draws, as JSON values."""
        return dict(self._random.bit_generator.state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state()` was taken."""
        self._random.bit_generator.state = state

    def _eligible(self, task: str) -> np.ndarray:
        episodes = self._dataset.episodes_of(task)
        good = episodes[self._dataset.successes[episodes] != 0]
        if not len(good):
            raise InputError(
                "no episode of the task can serve as an example: all failed",
                path=self._dataset.source,
                field=task,
                found=f"0 of {len(episodes)} episodes succeeded",
                expected="at least 1",
            )
        return good

    def _draw(self, pool: np.ndarray, count: int) -> np.ndarray:
        return pool[self._random.integers(len(pool), size=count)]


def moved(batch: PromptedBatch, device: torch.device) -> PromptedBatch:
    """The batch on the device, by one copy of all its tensors together, which nobody waits for.

    The memory that is copied from is page-locked and torch's: it is not used again before the copy is done.
    """
    tensors = {name: tensor.contiguous() for name, tensor in batch.tensors().items()}
    starts, total = {}, 0
    for name, tensor in tensors.items():
        starts[name] = total
        total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    here = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for name, part in _parts(here, tensors, starts).items():
        part.copy_(tensors[name])
    return batch.with_tensors(_parts(here.to(device, non_blocking=True), tensors, starts))


def _parts(whole: Tensor, like: Mapping[str, Tensor], starts: Mapping[str, int]) -> dict[str, Tensor]:
    """Views of these shapes and dtypes into bytes, each from its start on."""
    typed = {dtype: whole.view(dtype) for dtype in {tensor.dtype for tensor in like.values()}}
    return {
        name: typed[t.dtype].as_strided(t.shape, t.stride(), starts[name] // t.itemsize) for name, t in like.items()
    }


def check_batch(batch_size: int, tasks_per_batch: int, tasks: int) -> None:
    """Raise `InputError` unless a batch can be shared out evenly among that many of the tasks."""
    if not 1 <= tasks_per_batch <= tasks:
        raise InputError(
            "no such number of tasks a batch",
            field="training.tasks_per_batch",
            found=tasks_per_batch,
            expected=f"1 to {tasks}, the tasks that are trained on",
        )
    if batch_size < 1 or batch_size % tasks_per_batch:
        raise InputError(
            "the batch cannot be shared out evenly",
            field="training.batch_size",
            found=batch_size,
            expected=f"a multiple of {tasks_per_batch} (training.tasks_per_batch)",
        )
