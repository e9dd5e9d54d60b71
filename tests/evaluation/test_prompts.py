from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.data import TrajectoryDataset, save_minari
from llmdpd.errors import InputError
from llmdpd.evaluation.prompts import (
    TaskPrompt,
    behaviour_prompts,
    choose_demonstrations,
    other_texts,
    swap_names,
    swap_prompts,
    task_prompts,
)
from llmdpd.prompts import metaworld_prompt, task_prompt
from llmdpd.tasks.protocols import PROTOCOLS
from llmdpd.tasks.specs import shown_by

MakeData = Callable[..., TrajectoryDataset]


def with_facts(
    data: TrajectoryDataset, successes: list[int], noise: list[float], seeds: list[int] | None = None
) -> TrajectoryDataset:
    return dataclasses.replace(
        data,
        successes=np.array(successes, np.int8),
        noise_levels=np.array(noise, np.float32),
        seeds=data.seeds if seeds is None else np.array(seeds, np.int64),
    )


@pytest.mark.parametrize(
    ("successes", "noise", "chosen"),
    [
        ([1, 1, 1], [0.2, 0.1, 0.1], 1),
        ([1, 0, 1], [0.2, 0.0, 0.1], 2),
        ([-1, 1, -1], [0.0, 0.9, 0.0], 1),
        ([1, 1, 1], [float("nan")] * 3, 0),
        ([0, 0, -1], [0, 0, 0.5], 2),
    ],
)
def test_the_example_succeeded_and_is_the_least_noisy(
    metaworld_data: MakeData, successes: list[int], noise: list[float], chosen: int
) -> None:
    data = with_facts(metaworld_data(("reach-v3",)), successes, noise)
    assert choose_demonstrations(data, "reach-v3")[0] == chosen


def test_where_success_is_unknown_the_example_is_the_best(metaworld_data: MakeData) -> None:
    data = with_facts(metaworld_data(("push-v3", "reach-v3")), [-1] * 6, [float("nan")] * 6)
    rewards = np.zeros_like(data.rewards)
    rewards[data.offsets[4]] = 5.0
    rewards[data.offsets[1]] = 9.0
    data = dataclasses.replace(data, rewards=rewards)
    assert choose_demonstrations(data, "reach-v3")[0] == 4
    assert choose_demonstrations(data, "push-v3")[0] == 1


def test_an_evaluated_seed_is_no_example(metaworld_data: MakeData) -> None:
    data = metaworld_data(("reach-v3",))
    assert (
        choose_demonstrations(with_facts(data, [1] * 3, [0] * 3, [1_000_000_000, 1_500_000_003, 7]), "reach-v3")[0] == 2
    )
    with pytest.raises(InputError, match="0 of 3 episodes on seeds that are not evaluated"):
        choose_demonstrations(with_facts(data, [1] * 3, [0] * 3, [1_000_000_000] * 3), "reach-v3")


def test_no_example_where_all_failed_or_the_task_is_absent(metaworld_data: MakeData) -> None:
    with pytest.raises(InputError) as error:
        choose_demonstrations(metaworld_data(("reach-v3",), success=0), "reach-v3")
    assert error.value.field == "reach-v3"
    with pytest.raises(InputError, match="no such task"):
        choose_demonstrations(metaworld_data(("reach-v3",)), "push-v3")


def test_prompts_of_tasks_and_where_they_are_from(metaworld_data: MakeData, tmp_path: Path) -> None:
    save_minari(metaworld_data(("reach-v3", "push-v3")), tmp_path)
    prompts = task_prompts(("push-v3", "reach-v3"), tmp_path, True)
    assert list(prompts) == ["push-v3", "reach-v3"]
    for task, prompt in prompts.items():
        assert prompt.text == metaworld_prompt(task).render()
        assert prompt.text_source == "built in"
        assert prompt.demonstration is not None
        assert prompt.demonstration.task == task
        assert prompt.demonstration_source == str(tmp_path)
    other = task_prompts(("push-v3",), None, True, "do this", "file.txt")["push-v3"]
    assert (other.text, other.text_source, other.demonstrations) == ("do this", "file.txt", ())


def test_several_examples_are_the_best_ones(metaworld_data: MakeData, tmp_path: Path) -> None:
    data = with_facts(metaworld_data(("reach-v3",), 5), [1, 0, 1, 1, 1], [0.3, 0.0, 0.1, 0.2, 0.1])
    assert choose_demonstrations(data, "reach-v3", 3) == [2, 4, 3]
    assert choose_demonstrations(data, "reach-v3", 9) == [2, 4, 3, 0]
    save_minari(data, tmp_path)
    (prompt,) = task_prompts(("reach-v3",), tmp_path, True, count=3).values()
    assert [example.seed for example in prompt.demonstrations] == [2, 4, 3]
    assert prompt.demonstration_source == f"3 demonstrations from {tmp_path}"
    with pytest.raises(InputError, match="not as many demonstrations") as error:
        task_prompts(("reach-v3",), tmp_path, True, count=5)
    assert error.value.found == "4 that can serve"


def test_a_behaviour_is_measured_by_the_first_that_succeeded(metaworld_data: MakeData) -> None:
    data = with_facts(metaworld_data(("reach-v3",), 5), [1, 0, 1, 1, 1], [0.3, 0.0, 0.1, 0.2, 0.1])
    for count, seeds in ((2, [0, 2]), (9, [0, 2, 3, 4])):
        (prompt,) = behaviour_prompts(("reach-v3",), "slow", data, count).values()
        assert [example.seed for example in prompt.demonstrations] == seeds
        assert prompt.demonstration_source == f"slow: {len(seeds)} demonstrations from made by a test"


def made_up(*tasks: str) -> dict[str, TaskPrompt]:
    return {task: TaskPrompt(f"text of {task}", "built in", (), f"data of {task}") for task in tasks}


def test_swapped_prompts_are_another_tasks_of_the_same_split(rng: np.random.Generator) -> None:
    names = [f"task-{number}-v3" for number in rng.permutation(9)]
    seen = names[:4]
    swapped = swap_prompts(made_up(*names), seen)
    assert list(swapped) == names
    for part in (seen, names[4:]):
        assert sorted(str(swapped[task].text) for task in part) == sorted(f"text of {task}" for task in part)
    for task, prompt in swapped.items():
        other = str(prompt.text).removeprefix("text of ")
        assert other != task
        assert prompt.text_source == f"swapped ({other}'s): built in"
        assert prompt.demonstration_source == f"swapped ({other}'s): data of {other}"
    assert swap_prompts(made_up(*reversed(names)), seen) == swapped
    with pytest.raises(InputError, match="alone among the unseen"):
        swap_prompts(made_up(*names[:5]), seen)


def test_the_test_tasks_of_ml45_are_not_swapped_with_their_twins() -> None:
    from llmdpd.tasks.metaworld.names import ML45_TEST

    swapped = swap_prompts(made_up(*ML45_TEST), ())
    assert swapped["door-lock-v3"].text != "text of door-unlock-v3"
    assert swapped["door-unlock-v3"].text != "text of door-lock-v3"


def test_a_task_has_the_demonstration_of_the_one_that_shows_it(metaworld_data: MakeData, tmp_path: Path) -> None:
    data = with_facts(
        metaworld_data(("finish-push", "finish-soccer")), [1, 1, 0, 1, 1, 1], [0.2, 0.1, 0, 0.3, 0.2, 0.1]
    )
    save_minari(data, tmp_path)
    tasks = ("wait-push", "finish-push", "wait-soccer")
    chosen = {"wait-push": ("finish-push", 1), "finish-push": ("finish-push", 1), "wait-soccer": ("finish-soccer", 2)}
    prompts = task_prompts(tasks, tmp_path, True)
    first = {"wait-push": 0, "finish-push": 0, "wait-soccer": 0}
    for found, seeds in (
        (prompts, {task: seed for task, (_, seed) in chosen.items()}),
        (behaviour_prompts(tasks, "slow", data, 1), first),
    ):
        assert list(found) == list(tasks)
        for task, prompt in found.items():
            assert prompt.demonstration is not None
            assert (prompt.demonstration.task, prompt.demonstration.seed) == (chosen[task][0], seeds[task])
            assert prompt.text == task_prompt(task).render()
    with pytest.raises(InputError, match="no such task") as error:
        task_prompts(("wait-reach",), tmp_path, True)
    assert error.value.expected == "finish-reach"


def test_other_texts_leave_the_demonstration_and_change_the_text(metaworld_data: MakeData, tmp_path: Path) -> None:
    save_minari(metaworld_data(("finish-push",)), tmp_path)
    own = task_prompts(("wait-push", "finish-push"), tmp_path, True)
    changed = other_texts(own)
    for task, other in (("wait-push", "finish-push"), ("finish-push", "wait-push")):
        assert changed[task].text == own[other].text != own[task].text
        assert changed[task].text_source == f"other text ({other}'s): built in"
        assert changed[task].demonstrations is own[task].demonstrations
        assert changed[task].demonstration_source == own[task].demonstration_source
    with pytest.raises(InputError, match="no other task shares") as error:
        other_texts({**own, **made_up("push-v3")})
    assert (error.value.field, error.value.found) == ("--prompts other-text", "push-v3")


def test_swapped_prompts_have_another_demonstration_where_some_share_theirs() -> None:
    # Half the sorted list further on, each finish-TASK would meet wait-TASK, with the same demonstration.
    protocol = PROTOCOLS["text"]
    others = swap_names(protocol.all, protocol.seen)
    assert set(others.values()) == set(protocol.all)
    assert not any(shown_by(task) == shown_by(other) for task, other in others.items())
    assert swap_names(("wait-push", "finish-push"), ()) == {"wait-push": "finish-push", "finish-push": "wait-push"}
