from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmdpd.data import load_dataset, save_minari
from llmdpd.data.collecting import scripted as collection
from llmdpd.data.collecting.scripted import (
    CollectConfig,
    collect_scripted,
    content_hash,
    noise_schedule,
    parse_noise,
    partial_folder,
    resolve_tasks,
)
from llmdpd.errors import InputError
from llmdpd.tasks import COLLECTION_SEED_END
from llmdpd.tasks.metaworld.names import ML45_TRAIN, TASKS
from llmdpd.utils.files import process_lock


def config(tmp_path: Path, **changes: object) -> CollectConfig:
    """Two tasks, short episodes: reach succeeds within 60 steps, push does not."""
    base = CollectConfig(
        tasks=("reach", "push-v2"), episodes=4, noise="clean,gaussian", out=tmp_path / "out", post_success_steps=3,
        max_steps=60, workers=1,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_content_is_the_same_for_any_number_of_workers(tmp_path: Path, fresh_seed: int) -> None:
    calls: list[tuple[int, int, int]] = []
    one = collect_scripted(config(tmp_path, seed=fresh_seed), lambda *args: calls.append(args))
    two = collect_scripted(config(tmp_path, seed=fresh_seed, workers=2, out=tmp_path / "two"))
    assert one.content == two.content
    assert np.array_equal(one.dataset.observations, two.dataset.observations)
    assert list(dict.fromkeys(call[:2] for call in calls)) == [(n, 8) for n in range(9)]
    assert calls[-1][2] == one.dataset.num_transitions
    assert not partial_folder(one.out).exists()


def test_what_is_read_back_is_what_was_collected(tmp_path: Path) -> None:
    first = collect_scripted(config(tmp_path))
    again = collect_scripted(config(tmp_path, workers=2))
    assert again.reused
    assert not first.reused
    assert again.content == first.content == content_hash(again.dataset)
    assert again.summaries == first.summaries
    assert again.dataset.source == first.dataset.source
    assert again.dataset.behaviours == first.dataset.behaviours
    # An episode goes on for three steps after its first success, or to its limit of 60.
    succeeded = first.dataset.successes == 1
    steps = first.dataset.success_steps
    left = first.dataset.lengths - 1 - steps
    assert succeeded.any()
    assert steps.tolist() == again.dataset.success_steps.tolist()
    assert ((steps >= 0) == succeeded).all()
    assert ((left == 3) | ((first.dataset.lengths == 60) & (left < 3)))[succeeded].all()
    assert content_hash(dataclasses.replace(first.dataset, success_steps=np.full(8, -1))) == first.content
    assert load_dataset(first.out).num_transitions == first.dataset.num_transitions
    with pytest.raises(InputError, match="another configuration") as caught:
        collect_scripted(config(tmp_path, seed=9))
    assert (caught.value.field, caught.value.path) == ("seed", str(tmp_path / "out"))
    # A folder whose data sets were exchanged is not taken for the one that was collected.
    save_minari(first.dataset.select([0, 1, 2, 4]), first.out)
    with pytest.raises(InputError, match="not those that were collected"):
        collect_scripted(config(tmp_path))


def test_shards_hold_what_minari_data_sets_do(tmp_path: Path) -> None:
    wanted = config(tmp_path, out=tmp_path / "a")
    memory = collect_scripted(wanted)
    stored = collect_scripted(dataclasses.replace(wanted, out=tmp_path / "b", format="shards"))
    assert stored.dataset.stored
    assert (stored.summaries, stored.reused) == (memory.summaries, False)
    rows = np.arange(memory.dataset.num_transitions)
    for own, other in zip(stored.dataset.gather(rows), memory.dataset.gather(rows), strict=True):
        np.testing.assert_array_equal(own, other)
    for name in ("tasks", "texts", "behaviours", "goal_visible"):
        assert getattr(stored.dataset, name) == getattr(memory.dataset, name)
    again = collect_scripted(dataclasses.replace(wanted, out=tmp_path / "b", format="shards"))
    assert (again.reused, again.content) == (True, stored.content)
    assert collect_scripted(dataclasses.replace(wanted, out=tmp_path / "b")).dataset.stored
    with pytest.raises(InputError, match="not in shards"):
        collect_scripted(dataclasses.replace(wanted, format="shards"))


def test_the_goal_can_be_hidden_and_seeds_differ(tmp_path: Path) -> None:
    shown = collect_scripted(config(tmp_path, tasks=("reach",), episodes=2)).dataset
    other = collect_scripted(config(tmp_path, tasks=("reach",), episodes=2, seed=1, out=tmp_path / "other")).dataset
    assert not set(shown.seeds.tolist()) & set(other.seeds.tolist())
    hidden = collect_scripted(
        config(tmp_path, tasks=("reach",), episodes=2, goal_visible=False, out=tmp_path / "h")
    ).dataset
    assert not hidden.observations[:, 36:39].any()
    assert hidden.goal_visible is False
    assert np.array_equal(hidden.actions, shown.actions)


def test_failed_episodes_can_be_left_out(tmp_path: Path) -> None:
    noisy = {"tasks": ("reach",), "noise": "clean,random", "max_steps": 70}
    everything = collect_scripted(config(tmp_path, **noisy))
    kept = collect_scripted(config(tmp_path, **noisy, keep_failed=False, out=tmp_path / "kept"))
    failed = int((everything.dataset.successes == 0).sum())
    assert 0 < failed < 4
    assert kept.dataset.num_episodes == 4 - failed
    assert (kept.dataset.successes == 1).all()
    (summary,) = kept.summaries
    assert (summary.episodes, summary.kept) == (4, 4 - failed)
    assert sum(of for _, of in summary.successes.values()) == 4
    with pytest.raises(InputError, match="no episode of a task succeeded") as caught:
        collect_scripted(config(tmp_path, max_steps=3, keep_failed=False, out=tmp_path / "none"))
    assert "push-v3" in str(caught.value)


def interrupted(tmp_path: Path, after: int, **changes: object) -> Path:
    """A partial collection of `after` episodes."""

    def stop(finished: int, total: int, transitions: int) -> None:
        if finished == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_scripted(config(tmp_path, **changes), stop)
    return partial_folder(tmp_path / "out")


def test_an_interrupted_collection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect_scripted(config(tmp_path, out=tmp_path / "whole"))
    partial = interrupted(tmp_path, 3)
    assert not (tmp_path / "out").exists()
    kept = {path: path.stat().st_mtime_ns for path in partial.rglob("*.npz")}
    assert len(kept) == 3
    # A damaged one is run again.
    damaged = next(iter(kept))
    damaged.write_bytes(damaged.read_bytes()[:100])
    finished: list[int] = []
    resumed = collect_scripted(config(tmp_path), lambda done, total, steps: finished.append(done))
    assert list(dict.fromkeys(finished)) == [2, 3, 4, 5, 6, 7, 8]
    assert resumed.content == whole.content
    assert not partial.exists()


COLLECT = """
    import sys
    from pathlib import Path
    from llmdpd.data.collecting.scripted import CollectConfig, collect_scripted

    if __name__ == "__main__":
        tasks, out = ("reach", "push-v2"), Path(sys.argv[1])
        config = CollectConfig(tasks, 4, "clean,gaussian", out, post_success_steps=3, max_steps=60, workers=1)
        made = collect_scripted(config, lambda *progress: print(*progress, flush=True))
        print(made.content, made.reused, flush=True)
"""


def test_several_processes_that_want_the_same_collect_it_once(tmp_path: Path) -> None:
    (tmp_path / "collect.py").write_text(textwrap.dedent(COLLECT))
    command = [sys.executable, str(tmp_path / "collect.py"), str(tmp_path / "out")]
    crowd = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in crowd]
    assert [process.returncode for process in crowd] == [0, 0, 0]
    ends = [output[-1].split() for output in outputs]
    assert len({content for content, _ in ends}) == 1
    assert sorted(reused for _, reused in ends) == ["False", "True", "True"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collect.py", "out"]


def test_a_collection_that_waits_says_so_and_can_be_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stop(*progress: int) -> None:
        calls.append(progress)
        if len(calls) == 2:
            raise KeyboardInterrupt

    calls: list[tuple[int, ...]] = []
    caplog.set_level("INFO")
    with process_lock(tmp_path / ".out.lock", lambda holder: None), pytest.raises(KeyboardInterrupt):
        collect_scripted(config(tmp_path), stop)
    assert calls == [(0, 8, 0)] * 2
    assert caplog.text.count(f"waiting for process {os.getpid()}") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_finished_collection_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = config(tmp_path, tasks=("reach",), episodes=1, max_steps=5)
    collect_scripted(small)
    monkeypatch.setattr(collection, "process_lock", lambda *arguments: pytest.fail("a lock would be written"))
    assert collect_scripted(small).reused


def test_the_lock_of_one_that_was_killed_at_its_end_is_removed(tmp_path: Path) -> None:
    small = config(tmp_path, tasks=("reach",), episodes=1, max_steps=5)
    lock = collect_scripted(small).out.with_name(".out.lock")
    lock.write_text("1")
    assert collect_scripted(small).reused
    assert not lock.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 1), ("episodes", 5), ("tail", 4), ("noise", "clean"), ("tasks", ("reach",)), ("goal_visible", False)],
)
def test_another_configuration_is_refused(tmp_path: Path, field: str, value: object) -> None:
    partial = interrupted(tmp_path, 1)
    before = sorted(partial.rglob("*"))
    with pytest.raises(InputError, match="another configuration") as caught:
        collect_scripted(config(tmp_path, **{{"tail": "post_success_steps"}.get(field, field): value}))
    assert caught.value.field == field  # as the manifest calls it
    assert caught.value.path == str(partial)
    assert sorted(partial.rglob("*")) == before


def test_foreign_folders_and_manifests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="something else") as caught:
        collect_scripted(config(tmp_path))
    assert caught.value.found == "thesis.tex"
    (tmp_path / "out" / "thesis.tex").unlink()
    (tmp_path / "out" / "collect.json").write_text(json.dumps({"config": 3}))
    with pytest.raises(InputError, match="not the configuration"):
        collect_scripted(config(tmp_path))


def test_nothing_is_left_where_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    small = config(tmp_path, tasks=("reach",), episodes=2, max_steps=5)
    monkeypatch.setattr(collection, "save_minari", full)
    with pytest.raises(OSError, match="No space"):
        collect_scripted(small)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.undo()
    finished: list[int] = []
    collect_scripted(small, lambda done, total, steps: finished.append(done))
    assert finished == [2]


def test_the_schedule_keeps_the_shares_in_every_prefix(rng: np.random.Generator) -> None:
    weights = rng.uniform(0.05, 1, 4)
    print("shares", weights)
    shares = dict(zip(("clean", "gaussian", "bursts", "random"), (weights / weights.sum()).tolist(), strict=True))
    kinds = noise_schedule(shares, 200)
    for n in range(1, 201):
        counts = Counter(kinds[:n])
        assert all(abs(counts[kind] - share * n) < 2 for kind, share in shares.items())
        if n % 50 == 0:
            assert kinds[:n] == noise_schedule(shares, n)


def test_settings() -> None:
    assert resolve_tasks(("all",)) == TASKS
    assert resolve_tasks(("ml45-train",)) == ML45_TRAIN
    assert resolve_tasks(("reach-v2", "push", "reach")) == ("reach-v3", "push-v3")
    assert parse_noise("clean:1,gaussian:3") == {"clean": 0.25, "gaussian": 0.75}
    assert parse_noise("bursts, random") == {"bursts": 0.5, "random": 0.5}


NOISES = ("", "cleen", "clean:0", "clean:-1", "clean:x", "clean:nan", "clean:inf", "clean,clean")
WRONG = [
    ("episodes", 0),
    ("max_steps", 0),
    ("max_steps", 501),
    ("post_success_steps", -1),
    ("seed", -1),
    ("workers", 0),
]


@pytest.mark.parametrize(
    ("field", "value"),
    [*WRONG, ("workers", 0), ("tasks", ()), ("tasks", ("reach", "pusch")), *[("noise", noise) for noise in NOISES]],
)
def test_wrong_settings_are_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        collect_scripted(config(tmp_path, **{field: value}))
    assert caught.value.field == ("task" if value == ("reach", "pusch") else field)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_holds_what_was_asked_for(tmp_path: Path) -> None:
    collected = collect_scripted(config(tmp_path))
    data = collected.dataset
    assert data.tasks == ("reach-v3", "push-v3")
    assert data.num_episodes == 8
    assert data.goal_visible is True
    assert all(text.startswith("Task:") for text in data.texts)
    assert len(set(data.seeds.tolist())) == 8
    assert 0 <= data.seeds.min() <= data.seeds.max() < COLLECTION_SEED_END
    assert not data.terminals.any()
    assert data.behaviours == ("clean", "gaussian") * 4
    clean = data.noise_levels == 0
    assert clean.tolist() == [True, False] * 4
    assert data.expert_actions is not None
    assert np.array_equal(data.select(clean).actions, data.select(clean).expert_actions)
    # Failed episodes are there and marked.
    assert set(data.successes.tolist()) <= {0, 1}
    assert (data.lengths[data.successes == 0] == 60).all()
    assert data.successes[0] == 1
    for task, summary in zip(data.tasks, collected.summaries, strict=True):
        mine, own = data.select(data.episodes_of(task)), clean[data.episodes_of(task)]
        counts = {"clean": (int(mine.successes[own].sum()), 2), "gaussian": (int(mine.successes[~own].sum()), 2)}
        assert (summary.task, summary.successes, summary.transitions) == (task, counts, mine.num_transitions)
        assert summary.mean_length == pytest.approx(mine.lengths.mean())
    # The hash sees every array and what else is learned from, but no source and no behaviours' names.
    hashes = {content_hash(data)}
    for name in ("observations", "actions", "rewards", "next_observations", "expert_actions", "noise_levels"):
        changed = getattr(data, name).copy()
        changed.reshape(-1)[0] += 0.5
        hashes.add(content_hash(dataclasses.replace(data, **{name: changed})))
    for change in ({"seeds": data.seeds + 1}, {"texts": ("x", "y")}, {"goal_visible": False}):
        hashes.add(content_hash(dataclasses.replace(data, **change)))
    assert len(hashes) == 10
    assert content_hash(dataclasses.replace(data, source="elsewhere", behaviours=())) == content_hash(data)
