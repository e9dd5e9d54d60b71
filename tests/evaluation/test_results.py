"""results.json: intervals against published values, records to JSON and back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdpd.errors import InputError
from llmdpd.evaluation.intervals import wilson_interval
from llmdpd.evaluation.results import ActingUse, PromptUse, TaskResult, read_results, write_results

ACTING = ActingUse(samples=50, selection="soft", temperature=0.5, noise_scale=1.0, sampler="ddpm", steps=5)
RECORD = TaskResult(
    task="sweep-into-v3",
    split="seen",
    protocol="paper",
    episodes=25,
    max_steps=500,
    seed=3,
    prompts=PromptUse(text=True, trajectory="held-out expert episodes"),
    acting=ACTING,
    trained_on=("sweep-into-v3", "coffee-push-v3"),
    training_data="scripted experts",
    goal_visible=True,
    checkpoint="last",
    context="pooled",
    iterations=1000,
    wall_seconds=4.5,
    successes=20,
)
LOCOMOTION = replace(
    RECORD,
    task="hopper-v5",
    goal_visible=None,
    successes=None,
    returns_mean=-12.5,
    returns_std=3.0,
    normalised_score=0.24,
)

names = st.text(min_size=1, max_size=12)
finite = st.floats(-1e6, 1e6)
records = st.builds(
    lambda task, episodes, fraction, **values: TaskResult(
        task=task, episodes=episodes, successes=round(fraction * episodes), context="pooled", **values
    ),
    task=names,
    episodes=st.integers(1, 2000),
    fraction=st.floats(0, 1),
    split=st.sampled_from(["seen", "unseen"]),
    protocol=names,
    seed=st.integers(-(2**40), 2**40),
    max_steps=st.integers(1, 1000),
    acting=st.builds(
        ActingUse,
        samples=st.integers(1, 99),
        selection=names,
        temperature=finite,
        noise_scale=finite,
        sampler=names,
        steps=st.integers(1, 99),
    ),
    prompts=st.builds(PromptUse, st.booleans() | names, st.booleans() | names),
    trained_on=st.lists(names, max_size=4).map(tuple),
    training_data=st.text(max_size=20),
    goal_visible=st.sampled_from([True, False, None]),
    checkpoint=st.sampled_from(["last", "best"]),
    iterations=st.integers(0, 10**9),
    wall_seconds=finite,
)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # 81/263, 15/148, 0/20, 1/29: Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3. 8/10 and 0/25
    # as commonly quoted; 25/25 mirrors 0/25.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (0, 25, 0.0, 0.1332),
        (25, 25, 0.8668, 1.0),
    ],
)
def test_wilson_interval_equals_published_values(successes: int, episodes: int, low: float, high: float) -> None:
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_interval_holds_the_rate_and_stays_a_probability(episodes: int, part: float) -> None:
    successes = round(part * episodes)
    low, high = wilson_interval(successes, episodes)
    assert 0.0 <= low <= successes / episodes <= high <= 1.0
    assert low < high
    mirrored = wilson_interval(episodes - successes, episodes)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("arguments", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError):
        wilson_interval(*arguments)


@given(records)
def test_a_record_comes_back_from_json_as_it_was(record: TaskResult) -> None:
    assert TaskResult.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False))) == record


def test_the_file_holds_what_the_design_promises(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, [RECORD, LOCOMOTION])
    value = json.loads(path.read_text())
    assert value["schema"] == 2
    success, locomotion = value["records"]
    assert success["success_rate"] == 0.8
    assert success["ci95"] == pytest.approx([0.6087, 0.9114], abs=1e-4)
    assert success["prompts"] == {"text": True, "trajectory": "held-out expert episodes"}
    assert success["trained_on"] == ["sweep-into-v3", "coffee-push-v3"]
    assert "returns_mean" not in success
    assert locomotion["normalised_score"] == 0.24
    assert locomotion["goal_visible"] is None
    assert "successes" not in locomotion
    assert "ci95" not in locomotion
    assert read_results(path) == [RECORD, LOCOMOTION]


def test_how_it_was_evaluated_tells_results_apart_and_the_same_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match="two results") as caught:
        write_results(path, [RECORD, replace(RECORD, successes=21)])
    assert caught.value.field == "records[1]"
    assert not path.exists()
    others = [replace(RECORD, max_steps=150), replace(RECORD, acting=replace(ACTING, samples=1))]
    write_results(path, [RECORD, *others])
    assert read_results(path) == [RECORD, *others]


def test_acting_in_words() -> None:
    assert str(ACTING) == "soft choice (temperature 0.5) of 50, ddpm in 5 steps, noise scale 1"
    horizon = str(replace(ACTING, samples=1, action_horizon=3))
    assert horizon == "1 sample, ddpm in 5 steps, noise scale 1, action horizon 3"
    assert str(replace(ACTING, selection="max")) == "best of 50, ddpm in 5 steps, noise scale 1"
    assert str(replace(ACTING, samples=1, noise_scale=0.25)) == "1 sample, ddpm in 5 steps, noise scale 0.25"


def _acting(**changes: Any) -> dict[str, Any]:
    return asdict(ACTING) | changes


WRONG: dict[str, tuple[Any, ...]] = {
    **{"task": ("", 3), "split": ("test",), "checkpoint": ("final",), "episodes": (0, 25.0, True)},
    **{"iterations": (-1,), "seed": ("0",), "max_steps": (0,), "goal_visible": (1,), "mean": (1.0,)},
    **{"prompts.": (True,), "trained_on": ("sweep-into-v3", [1]), "successes": (26, -1, None)},
    "prompts.text": ({"text": None, "trajectory": True},),
    "prompts.trajectory": (
        {"text": True},
        {"text": True, "trajectory": ""},
    ),
    **{
        "acting.": ("ddpm",),
        "acting.samples": (_acting(samples=0),),
        "acting.more": (_acting(more=1),),
    },
    **{"acting.noise_scale": (_acting(noise_scale=float("nan")),), "acting.selection": ({"samples": 1},)},
    **{"success_rate": (0.99, "high", [1, 2]), "ci95": ([0.1, 0.2], 3, None)},
    **{"wall_seconds": (float("nan"), 10**400), "normalised_score": (float("inf"),)},
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_field_that_cannot_be_is_named_with_its_file(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "results.json"
    broken = RECORD.to_json() | {field.split(".")[0]: value}
    path.write_text(json.dumps({"schema": 2, "records": [LOCOMOTION.to_json(), broken]}))
    with pytest.raises(InputError) as caught:
        read_results(path)
    assert caught.value.field == f"records[1].{field}"
    assert str(path) in str(caught.value)


def test_a_record_has_successes_returns_or_both() -> None:
    both = TaskResult.from_json(RECORD.to_json() | {"returns_mean": 1.0})
    assert (both.successes, both.returns_mean) == (RECORD.successes, 1.0)
    for wrong in ({"action_error": 0.1}, {"successes": None, "success_rate": None, "ci95": None}):
        with pytest.raises(InputError) as caught:
            TaskResult.from_json(RECORD.to_json() | wrong)
        assert caught.value.field == "successes"


def test_a_missing_field_is_named() -> None:
    since = {"method", "tracked", "tracked_successes"}  # not in the records of every version
    for name in sorted(set(RECORD.to_json()) - {"successes", "success_rate", "ci95"} - since):
        value = RECORD.to_json()
        del value[name]
        with pytest.raises(InputError) as caught:
            TaskResult.from_json(value)
        assert caught.value.field == name


def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match=r"results\.json"):
        read_results(path)
    for text in ("", "{", "[]", "null", '{"schema": 2}', '{"records": []}', '{"schema": 2, "records": [3]}'):
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_results(path)
        assert caught.value.path == str(path)
    path.write_text(json.dumps({"schema": 1, "records": [RECORD.to_json()]}))
    with pytest.raises(InputError, match="another version") as caught:
        read_results(path)
    assert (caught.value.field, caught.value.found, caught.value.expected) == ("schema", "1", 2)
    assert "llmdpd.evaluate" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "trajectory", "kind"),
    [
        ("built in", "runs/a/prompt_data", "own"),
        (True, True, "own"),
        ("built in", False, "text alone"),
        (False, "minari:some/data-v0", "demonstration alone"),
        (False, False, "no prompts"),
        ("built in", "slow: 5 examples from data/x", "slow"),
        (False, "slow: 5 examples from data/x", "demonstration alone, slow"),
        ("swapped (push-v3's): built in", "swapped (push-v3's): data", "swapped"),
        ("other text (wait-push's): built in", "runs/a/prompt_data", "other text"),
        ("other text (wait-push's): built in", "slow: 5 examples from data/x", "other text, slow"),
        ("other text (wait-push's): built in", False, "other text, text alone"),
        ("swapped (push-v3's): built in", "swapped (push-v3's): cut: 5 examples from data", "swapped, cut"),
        ("built in", "C: 5 examples", "own"),
    ],
)
def test_prompts_tell_their_kind(text: bool | str, trajectory: bool | str, kind: str) -> None:
    assert PromptUse(text, trajectory).kind == kind


def test_records_of_earlier_versions_can_be_read() -> None:
    value = RECORD.to_json()
    assert value.pop("method") == "llmdpd"
    del value["acting"]["action_horizon"], value["acting"]["precision"]
    assert TaskResult.from_json(value) == RECORD
    value["context"] = "control-replay"
    value["acting"] |= {"replan": 3, "views": 8}
    read = TaskResult.from_json(value)
    assert (read.context, read.acting.action_horizon) == ("non-learned-replay, 8 views", 3)
    value["acting"]["views"] = 1
    assert TaskResult.from_json(value).context == "non-learned-replay"
    assert replace(RECORD, method="bc").identity != RECORD.identity
