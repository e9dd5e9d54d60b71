from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.data import TrajectoryDataset
from llmdpd.data.augmentation import AugmentationConfig
from llmdpd.errors import InputError
from llmdpd.methods.batch import PromptedBatch
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.metaworld.layout import LAYOUT
from llmdpd.training.batches import BatchSampler, moved
from llmdpd.utils.sharding import share_of

TASKS = ("reach-v3", "push-v3", "sweep-v3")
ENCODER = TrajectoryEncoderConfig(steps=8)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def dataset(metaworld_data: Callable[..., TrajectoryDataset], rng: np.random.Generator) -> TrajectoryDataset:
    return metaworld_data(TASKS, 4, seed=int(rng.integers(1000)), length=9)


def make_sampler(dataset: TrajectoryDataset, size: int = 12, tasks: int = 3, **changes: Any) -> BatchSampler:
    embeddings = torch.arange(len(dataset.tasks), dtype=torch.float32)[:, None].repeat(1, 5)
    arguments: dict[str, Any] = {"embeddings": embeddings, "encoder": ENCODER, "seed": 0, "device": torch.device("cpu")}
    return BatchSampler(dataset, batch_size=size, prompts=tasks, **(arguments | changes))


def rows_of(dataset: TrajectoryDataset, batch: PromptedBatch) -> list[int]:
    """The data set's row of each transition; random observations are unique."""
    found = []
    for state in batch.observations.numpy():
        (row,) = np.flatnonzero((dataset.observations == state).all(1))
        found.append(int(row))
    return found


def test_each_task_has_its_share_under_its_own_prompts(dataset: TrajectoryDataset) -> None:
    sampler = make_sampler(dataset, tasks=2, size=10)
    for _ in range(20):
        batch = sampler.next()
        rows = rows_of(dataset, batch)
        tasks = dataset.task_ids[dataset.episode_ids(rows)]
        assert batch.text is not None
        assert batch.tokens is not None
        assert batch.text[:, 0].repeat_interleave(5).tolist() == tasks.tolist()
        assert len(set(batch.text[:, 0].tolist())) == 2
        for task, state in zip(batch.text[:, 0].tolist(), batch.tokens.states[:, 0].numpy(), strict=True):
            (row,) = np.flatnonzero((dataset.observations == state).all(1))
            assert dataset.task_ids[dataset.episode_ids([row])[0]] == task
            assert dataset.gather([row]).timesteps[0] == 0, "a demonstration starts at its episode's start"


@pytest.mark.parametrize(("processes", "prompts"), [(2, 4), (4, 2), (4, 6), (3, 3)])
@pytest.mark.parametrize(("horizon", "sampling"), [(0, "even"), (3, "window")])
def test_each_process_has_its_part_of_the_whole_batch(
    metaworld_data: Callable[..., TrajectoryDataset],
    fresh_seed: int,
    processes: int,
    prompts: int,
    horizon: int,
    sampling: Any,
) -> None:
    dataset = metaworld_data(TASKS, 4, seed=fresh_seed % 1000, length=9)
    options: dict[str, Any] = {
        "size": 24,
        "tasks": prompts,
        "seed": fresh_seed,
        "horizon": horizon,
        "encoder": TrajectoryEncoderConfig(steps=4, sampling=sampling),
        "augmentation": (AugmentationConfig(offset=0.05, rotate=0.5, mirror=0.5), LAYOUT),
        "dropout": (0.3, 0.3),
        "self_prompted": 0.5,
        "layout": LAYOUT,
    }
    shares = [share_of(rank, processes, 24, prompts) for rank in range(processes)]
    whole = make_sampler(dataset, **options)
    parts = [make_sampler(dataset, **options, share=share) for share in shares]
    for _ in range(4):
        expected = whole.next()
        for sampler, share in zip(parts, shares, strict=True):
            found, own = sampler.next().leaves(), expected.part(share).leaves()
            assert found.keys() == own.keys()
            for name, leaf in own.items():
                same = torch.equal(leaf, found[name]) if isinstance(leaf, torch.Tensor) else leaf == found[name]
                assert same, name
    assert all(sampler.state() == whole.state() for sampler in parts)


def test_transitions_are_copied_whole(dataset: TrajectoryDataset) -> None:
    batch = make_sampler(dataset).next()
    rows = rows_of(dataset, batch)
    for name in ("actions", "rewards", "next_observations", "expert_actions"):
        assert torch.equal(getattr(batch, name), torch.from_numpy(getattr(dataset, name)[rows]))
    assert batch.timesteps.tolist() == dataset.gather(rows).timesteps.tolist()
    assert batch.terminals.dtype == torch.float32


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_prompts_is_over_the_demonstrations_own_transitions(
    metaworld_data: Callable[..., TrajectoryDataset], rng: np.random.Generator, share: float
) -> None:
    dataset = metaworld_data(TASKS, 40, seed=int(rng.integers(1000)), length=9)
    seed = int(rng.integers(1000))
    sampler = make_sampler(dataset, size=24, seed=seed, self_prompted=share)
    own, prompts = 0, 0
    for _ in range(100):
        batch = sampler.next()
        assert batch.tokens is not None
        episodes = dataset.episode_ids(rows_of(dataset, batch)).reshape(3, 8)
        for states, drawn in zip(batch.tokens.states[:, 0].numpy(), episodes, strict=True):
            (row,) = np.flatnonzero((dataset.observations == states).all(1))
            shown = dataset.episode_ids([row])[0]
            assert dataset.task_ids[shown] == dataset.task_ids[drawn[0]]
            own += bool((drawn == shown).all())
            prompts += 1
    # Eight draws of one of 40 episodes are not all the demonstration's by chance.
    assert abs(own / prompts - share) < 0.12
    if share == 0:
        assert own == 0


@pytest.mark.parametrize("expert", [True, False])
def test_windows_are_the_steps_from_each_transition_on(
    metaworld_data: Callable[..., TrajectoryDataset], rng: np.random.Generator, expert: bool
) -> None:
    dataset = metaworld_data(TASKS, 4, seed=int(rng.integers(1000)), length=9, expert=expert)
    assert make_sampler(dataset).next().windows is None
    batch = make_sampler(dataset, horizon=5).next()
    windows = batch.windows
    assert windows is not None
    assert torch.equal(windows.states[:, 0], batch.observations)
    assert torch.equal(windows.actions[:, 0], batch.actions)
    index, mask = dataset.windows(rows_of(dataset, batch), 5)
    assert torch.equal(windows.states, torch.from_numpy(dataset.observations[index]))
    assert torch.equal(windows.actions, torch.from_numpy(dataset.actions[index]))
    assert torch.equal(windows.mask, torch.from_numpy(mask))
    for row, steps in zip(windows.returns, index, strict=True):
        for value, step in zip(row.tolist(), steps.tolist(), strict=True):
            end = dataset.offsets[dataset.episode_ids([step])[0] + 1]
            assert value == pytest.approx(dataset.rewards[step:end].sum(), abs=1e-4)
    assert (windows.expert_actions is not None) == expert
    if dataset.expert_actions is not None and windows.expert_actions is not None:
        assert torch.equal(windows.expert_actions, torch.from_numpy(dataset.expert_actions[index]))
    # Where observations are changed, so are the windows: as one.
    change = AugmentationConfig(offset=0.5, rotate=1.0, mirror=0.5), LAYOUT
    changed = make_sampler(dataset, horizon=5, augmentation=change).next()
    assert changed.windows is not None
    assert not torch.allclose(changed.observations, batch.observations)
    torch.testing.assert_close(changed.windows.states[:, 0], changed.observations)
    torch.testing.assert_close(changed.windows.actions[:, 0], changed.actions)
    last = changed.windows.mask[:, 1]
    torch.testing.assert_close(changed.windows.states[last, 1], changed.next_observations[last])
    # With or without windows the samples are the same.
    assert torch.equal(batch.observations, make_sampler(dataset).next().observations)


def test_one_task_a_batch_needs_no_index(dataset: TrajectoryDataset) -> None:
    sampler = make_sampler(dataset, tasks=1, size=7)
    seen = set()
    for _ in range(40):
        batch = sampler.next()
        assert batch.text is not None
        assert batch.text.shape == (1, 5)
        assert batch.observations.shape == (7, 39)
        seen.add(batch.text[0, 0].item())
    assert seen == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("prompts", [True, False])
def test_a_batch_moves_whole_and_by_one_copy(
    dataset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch, device: str, prompts: bool
) -> None:
    batch = make_sampler(dataset, **({} if prompts else {"embeddings": None, "encoder": None})).next()
    copies: list[torch.Tensor] = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: copies.append(self) or to(self, *a, **k))
    there = moved(batch, torch.device(device))
    monkeypatch.undo()
    assert len(copies) == 1
    assert copies[0].is_pinned() == (device == "cuda")
    before, after = batch.leaves(), there.leaves()
    assert list(before) == list(after)
    for name, leaf in before.items():
        if isinstance(leaf, torch.Tensor):
            assert (after[name].dtype, after[name].device.type) == (leaf.dtype, device), name
            assert torch.equal(after[name].cpu(), leaf), name
            assert after[name].data_ptr() % 64 == 0, name
            assert after[name].is_contiguous(), name
        else:
            assert after[name] == leaf, name
    assert {"tokens.states", "text"} & batch.tensors().keys() == ({"tokens.states", "text"} if prompts else set())


@GPU
def test_a_sampler_for_a_gpu_samples_the_same_batches_and_waits_for_nothing(dataset: TrajectoryDataset) -> None:
    here, there = make_sampler(dataset), make_sampler(dataset, device=torch.device("cuda"))
    there.next()
    here.next()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [there.next() for _ in range(8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch in batches:
        for name, tensor in here.next().tensors().items():
            assert torch.equal(batch.tensors()[name].cpu(), tensor), name


def test_it_goes_on_where_its_state_was_taken(dataset: TrajectoryDataset) -> None:
    sampler, other = make_sampler(dataset), make_sampler(dataset, seed=1)
    sampler.next()
    state, first = sampler.state(), other.next()
    other.load_state(state)
    after = [sampler.next() for _ in range(3)]
    for one in after:
        again = other.next().tensors()
        assert all(torch.equal(tensor, again[name]) for name, tensor in one.tensors().items())
    assert not torch.equal(first.observations, after[0].observations), "another seed samples others"


def episodes_seen(dataset: TrajectoryDataset) -> tuple[set[int], set[int]]:
    """The episodes of the first task that 40 batches have as demonstrations, and those that they learn from."""
    sampler = make_sampler(dataset, tasks=1, size=30, encoder=TrajectoryEncoderConfig(steps=3))
    demonstrations, learned = set(), set()
    for _ in range(40):
        batch = sampler.next()
        assert batch.tokens is not None
        assert batch.text is not None
        if batch.text[0, 0] == 0:
            (row,) = np.flatnonzero((dataset.observations == batch.tokens.states[0, 0].numpy()).all(1))
            demonstrations.add(int(dataset.episode_ids([row])[0]))
            learned |= set(dataset.episode_ids(rows_of(dataset, batch)).tolist())
    return demonstrations, learned


def test_failed_episodes_are_learned_from_but_are_no_demonstrations(dataset: TrajectoryDataset) -> None:
    successes = dataset.successes.copy()
    successes[[0, 1, 3]] = 0  # of the first task only episode 2 is left
    assert episodes_seen(dataclasses.replace(dataset, successes=successes)) == ({2}, {0, 1, 2, 3})


def test_a_task_that_always_failed_is_refused(metaworld_data: Callable[..., TrajectoryDataset]) -> None:
    with pytest.raises(InputError, match="reach-v3"):
        make_sampler(metaworld_data(TASKS, 2, success=0))


def test_where_success_is_unknown_the_best_tenth_are_demonstrations(
    metaworld_data: Callable[..., TrajectoryDataset],
) -> None:
    dataset = metaworld_data(TASKS[:1], 20, success=-1)
    best = set(np.argsort(-dataset.returns())[:2].tolist())
    assert episodes_seen(dataset) == (best, set(range(20)))


def shown_rows(dataset: TrajectoryDataset, batch: PromptedBatch) -> list[int]:
    """The data set's row at which the demonstration of each prompt starts."""
    assert batch.tokens is not None
    starts = batch.tokens.states[:, 0].numpy()
    return [int(np.flatnonzero((dataset.observations == state).all(1))[0]) for state in starts]


def test_a_task_is_shown_by_anothers_episodes_and_learned_from_its_own(
    metaworld_data: Callable[..., TrajectoryDataset], rng: np.random.Generator
) -> None:
    dataset = metaworld_data(TASKS, 6, seed=int(rng.integers(1000)), length=9)
    sampler = make_sampler(dataset, size=24, seed=3, self_prompted=0.7, shown_by={"push-v3": "sweep-v3"})
    own = dict.fromkeys(TASKS, 0)
    for _ in range(60):
        batch = sampler.next()
        assert batch.text is not None
        learned = dataset.episode_ids(rows_of(dataset, batch)).reshape(3, 8)
        for number, episodes, row in zip(batch.text[:, 0].int(), learned, shown_rows(dataset, batch), strict=True):
            task, shown = dataset.tasks[number], dataset.episode_ids([row])[0]
            assert {dataset.tasks[each] for each in dataset.task_ids[episodes]} == {task}
            assert dataset.tasks[dataset.task_ids[shown]] == {"push-v3": "sweep-v3"}.get(task, task)
            own[task] += len(set(episodes)) == 1
    # Eight draws of six episodes are not all of one by chance: only those of the others' are their demonstration's.
    assert own["push-v3"] == 0
    assert min(own["reach-v3"], own["sweep-v3"]) > 25


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_tasks_that_show_themselves_are_drawn_as_without_others(
    metaworld_data: Callable[..., TrajectoryDataset], fresh_seed: int, share: float
) -> None:
    dataset = metaworld_data(TASKS, 6, length=9)
    samplers = [
        make_sampler(dataset, size=24, seed=fresh_seed, self_prompted=share, shown_by=shown)
        for shown in (None, {task: task for task in TASKS})
    ]
    # What is drawn, written out: the tasks, then for each prompt whether it is over its demonstration, and its rows.
    draw, rows = np.random.default_rng(fresh_seed), list[int]()
    for task in draw.permutation(3):
        own = dataset.episodes_of(TASKS[task])
        if share and draw.random() < share:
            (episode,) = own[draw.integers(6, size=1)]
            rows += draw.integers(*dataset.offsets[episode : episode + 2], size=8).tolist()
        else:
            rows += dataset.transitions_of(TASKS[task])[draw.integers(54 + 15, size=8)].tolist()
    assert rows_of(dataset, samplers[0].next()) == rows_of(dataset, samplers[1].next()) == rows
    for _ in range(5):
        first, second = (sampler.next().tensors() for sampler in samplers)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert samplers[0].state() == samplers[1].state()


def test_a_task_that_is_shown_by_an_absent_one_is_refused(dataset: TrajectoryDataset) -> None:
    with pytest.raises(InputError, match="demonstrations show push-v3") as error:
        make_sampler(dataset, shown_by={"push-v3": "soccer-v3"})
    assert (error.value.field, error.value.path) == ("push-v3", dataset.source)
    assert error.value.expected == "soccer-v3 beside push-v3"
    make_sampler(dataset, shown_by={"push-v3": "soccer-v3"}, encoder=None).next()  # nobody reads demonstrations


@pytest.mark.parametrize(("share", "prompts"), [(0.5, 4), (0.3, 4), (0.4, 1)])
def test_a_share_of_the_prompts_is_of_the_replayed_tasks(
    dataset: TrajectoryDataset, share: float, prompts: int
) -> None:
    sampler = make_sampler(dataset, tasks=prompts, replayed=TASKS[1:], replay=share)
    counts = []
    for _ in range(400):
        batch = sampler.next()
        assert batch.text is not None
        counts.append(int((batch.text[:, 0] > 0).sum()))
    assert np.mean(counts) / prompts == pytest.approx(share, abs=0.1)
    assert max(counts) - min(counts) <= 1
