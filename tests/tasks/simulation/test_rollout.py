from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.tasks.metaworld.environment import make_task
from llmdpd.tasks.simulation.processes import WorkerError
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest, EpisodeResult, LostEpisodesError


def act(observations: np.ndarray, index: np.ndarray, step: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """A row-wise policy that looks at everything it is given."""
    return np.sin(observations[:, :4] * 31 + (step + index + 7 * reward)[:, None])


def requests_for(tasks: list[str], count: int, seed: int, max_steps: int = 25) -> list[EpisodeRequest]:
    return [EpisodeRequest(task, seed + n, max_steps=max_steps) for task in tasks for n in range(count)]


def content(results: list[EpisodeResult]) -> list[tuple[object, ...]]:
    return [(r.request, r.success, r.episode_return, r.length, r.final_observation.tobytes()) for r in results]


def alone(toys: str, requests: list[EpisodeRequest], first: int = 0) -> list[tuple[object, ...]]:
    """The same episodes one by one, without any pool."""
    make = __import__(toys).make
    rows = []
    for index, request in enumerate(requests, first):
        environment = make(request.task, True, False)
        observation, reward, total, success, length = environment.reset(request.seed), 0.0, 0.0, False, 0
        while True:
            told = np.array([index]), np.array([length]), np.array([reward], np.float32)
            action = act(observation[None], *told)[0].astype(np.float32)
            observation, reward, now, over = environment.step(action)
            total, success, length = total + reward, success or now, length + 1
            if over or length == request.max_steps or (success and request.stop_on_success):
                break
        rows.append((request, success, total, length, observation.tobytes()))
    return rows


@pytest.mark.parametrize(("workers", "parallel"), [(1, 1), (1, 32), (2, 5), (3, 8)])
def test_results_are_those_of_single_episodes(toys: str, workers: int, parallel: int, fresh_seed: int) -> None:
    requests = requests_for(["plain", "short", "other"], 5, fresh_seed)
    requests.append(EpisodeRequest("plain", fresh_seed, max_steps=40, stop_on_success=False))
    with EnvPool(workers, parallel=parallel, make=f"{toys}:make") as pool:
        expected = alone(toys, requests)
        assert content(pool.run(requests, act)) == expected
        pids = pool.pids
        assert content(pool.run(requests[::-1][:4], act))[0][0] == requests[-1]
        assert pool.pids == pids
        assert len(pids) == min(workers, parallel)
    lengths = {row[3] for row in expected}
    assert 5 in lengths
    assert any(row[1] for row in expected) or max(lengths) in (25, 40)


def test_batches_do_not_depend_on_the_number_of_workers_or_on_deaths(toys: str, tmp_path: Path) -> None:
    """So results are the same bit for bit even where a policy's rounding depends on the batch."""

    def recorded(workers: int, flag: str) -> list[tuple[bytes, ...]]:
        batches = []

        def recording(observations: np.ndarray, index: np.ndarray, step: np.ndarray, reward: np.ndarray) -> np.ndarray:
            batches.append(tuple(part.tobytes() for part in (observations, index, step, reward)))
            return act(observations, index, step, reward)

        requests = requests_for(["plain", "short", f"die-once@{tmp_path / flag}"], 6, 77)
        with EnvPool(workers, parallel=7, make=f"{toys}:make") as pool:
            results = pool.run(requests, recording)
            assert bool(pool.deaths) == (not flag.startswith("calm"))
            assert any(result.redone for result in results) == bool(pool.deaths)
        return batches

    (tmp_path / "calm1").write_text("x")
    (tmp_path / "calm3").write_text("x")
    reference = recorded(1, "calm1")
    # File names are part of the toys' task names, not of what they compute.
    assert recorded(3, "calm3") == reference
    assert recorded(1, "storm1") == reference
    assert recorded(3, "storm3") == reference


def test_a_worker_killed_from_outside_leaves_no_trace_in_the_results(
    toys: str, fresh_seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    requests = requests_for(["sleep"], 8, fresh_seed, max_steps=40)
    with EnvPool(2, parallel=6, make=f"{toys}:make") as pool:
        undisturbed = content(pool.run(requests, act))
        assert pool.deaths == []
        victim = pool.pids[0]
        calls = 0

        def murderous(observations: np.ndarray, index: np.ndarray, step: np.ndarray, reward: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            if calls == 20:
                os.kill(victim, signal.SIGKILL)
            return act(observations, index, step, reward)

        with caplog.at_level(logging.WARNING):
            results = pool.run(requests, murderous)
        assert content(results) == undisturbed
        assert [death.pid for death in pool.deaths] == [victim]
        assert f"process {victim}" in caplog.text
        assert 1 <= sum(result.redone for result in results) <= 6
        assert victim not in pool.pids
        # Between two calls as well.
        os.kill(pool.pids[1], signal.SIGKILL)
        assert content(pool.run(requests, act)) == undisturbed
        assert len(pool.deaths) == 2


@pytest.mark.parametrize(("task", "deaths"), [("die-once", 1), ("die-twice", 2)])
def test_a_crash_inside_a_step_is_redone(toys: str, tmp_path: Path, fresh_seed: int, task: str, deaths: int) -> None:
    requests = [*requests_for(["sleep"], 5, fresh_seed), EpisodeRequest(f"{task}@{tmp_path / 'flag'}", fresh_seed, 500)]
    with EnvPool(1, parallel=6, make=f"{toys}:make") as pool:
        results = pool.run(requests, act)
        assert [death.exit_code for death in pool.deaths] == [-signal.SIGKILL] * deaths
    assert content(results) == alone(toys, requests)
    assert [result.redone for result in results] == [deaths] * 6


def test_an_episode_that_kills_every_worker_is_named(toys: str) -> None:
    # The others never succeed, so they share the worker with the culprit until its end.
    requests = [*requests_for(["sleep"], 5, 0), EpisodeRequest("die-always", 4242, 500)]
    with EnvPool(1, parallel=12, make=f"{toys}:make") as pool:
        with pytest.raises(RuntimeError, match=r"3 workers died in the episode of task die-always, seed 4242.*code 3"):
            pool.run(requests, act)
        assert len(pool.deaths) == 3
        assert len(pool.run(requests_for(["plain"], 2, 0), act)) == 2


def test_the_episodes_beside_those_that_workers_die_of_are_kept(toys: str, fresh_seed: int) -> None:
    deadly = EpisodeRequest("die-always", fresh_seed, 500)
    requests = [deadly, *requests_for(["plain", "short"], 6, fresh_seed)]
    with EnvPool(2, parallel=4, make=f"{toys}:make") as pool:
        with pytest.raises(LostEpisodesError) as caught:
            pool.run(requests, act)
        first, *others = caught.value.results
        assert first is None
        assert content([result for result in others if result]) == alone(toys, requests[1:], first=1)
        with pytest.raises(LostEpisodesError) as caught:  # not each of forty costs three workers
            pool.run([deadly] * 40, act)
        assert str(caught.value).count("workers died in the episode of task die-always") == 3


def test_an_exception_inside_a_worker_is_raised_and_the_pool_lives_on(toys: str) -> None:
    with EnvPool(2, parallel=6, make=f"{toys}:make") as pool:
        with pytest.raises(WorkerError, match=r"(?s)Traceback.*ArithmeticError: the toy broke"):
            pool.run([*requests_for(["plain"], 5, 0), EpisodeRequest("raise", 0, 500)], act)
        assert pool.deaths == []
        requests = requests_for(["plain"], 3, 0)
        assert content(pool.run(requests, act)) == alone(toys, requests)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda o: np.zeros((len(o) + 1, 4)), "expected"),
        (lambda o: np.zeros(len(o)), "expected"),
        (lambda o: np.full((len(o), 4), np.nan), "NaN or Inf"),
    ],
)
def test_wrong_actions_are_refused(toys: str, answer, message: str) -> None:  # type: ignore[no-untyped-def]
    with EnvPool(1, parallel=4, make=f"{toys}:make") as pool, pytest.raises(ValueError, match=message):
        pool.run(requests_for(["plain"], 3, 0), lambda o, i, s, r: answer(o))


def test_wrong_requests_are_refused_before_anything_runs() -> None:
    wrong = {
        "sweep-inot": EpisodeRequest("sweep-inot", 0, 500),
        "max_steps": EpisodeRequest("reach", 0, max_steps=0),
        "render=True": EpisodeRequest("reach", 0, 500, record=True),
    }
    with EnvPool(1) as pool:
        for problem, request in wrong.items():
            with pytest.raises(ValueError, match=problem) as caught:
                pool.run([request], act)
            assert isinstance(caught.value, InputError) == (problem == "sweep-inot")
        assert pool.pids == []
    for workers, parallel in ((0, 32), (1, 0)):
        with pytest.raises(ValueError, match="positive"):
            EnvPool(workers, parallel=parallel)


def test_environments_are_made_once_for_several_calls(toys: str, tmp_path: Path) -> None:
    # A worker's cache: as many environments of a task as ran at once, then no more.
    made = tmp_path / "made"
    folder = Path(__import__(toys).__file__).parent
    (folder / "llmdpd_counting.py").write_text(
        f"import llmdpd_toys\n"
        f"def make(task, goal_visible, render):\n"
        f"    open({str(made)!r}, 'a').write(task + '\\n')\n"
        f"    return llmdpd_toys.Toy(task, goal_visible, render)\n"
    )
    with EnvPool(2, parallel=4, make="llmdpd_counting:make") as pool:
        for _ in range(3):
            pool.run(requests_for(["plain", "other"], 6, 0), act)
    counts = made.read_text().split()
    # Two tasks over four places, in turn: at most four of each.
    assert 2 <= counts.count("plain") <= 4
    assert 2 <= counts.count("other") <= 4


def test_metaworld_episodes_equal_those_of_a_single_environment(fresh_seed: int) -> None:
    requests = [
        EpisodeRequest(task, fresh_seed + n, max_steps=15) for task in ("disassemble", "reach-v2") for n in range(2)
    ]
    with EnvPool(2, parallel=4) as pool:
        results = pool.run(requests, act)
        assert not any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in pool.pids)
    for index, result in enumerate(results):
        task = make_task(result.request.task)
        observation, reward, total = task.reset(result.request.seed), 0.0, 0.0
        for step in range(15):
            told = np.array([index]), np.array([step]), np.array([reward], np.float32)
            action = act(observation[None], *told)[0].astype(np.float32)
            observation, reward, success, _ = task.step(action)
            total += reward
            if success:
                break
        assert np.array_equal(result.final_observation, observation)
        assert result.episode_return == total


def test_a_script_needs_no_main_guard(toys: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[:] = {sys.path!r}\nprint('once')\n"
        "import numpy as np\nfrom llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest\n"
        f"with EnvPool(2, make='{toys}:make') as pool:\n"
        "    requests = [EpisodeRequest('plain', n, max_steps=5) for n in range(4)]\n"
        "    print(len(pool.run(requests, lambda o, i, s, r: np.zeros((len(o), 4)))))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["once", "4"], "")


def test_what_the_policy_is_given(toys: str) -> None:
    """One group at a time; steps counted from zero under the request's index; progress after each episode."""
    seen: dict[int, list[int]] = {}
    sizes: list[int] = []
    calls: list[int] = []

    def recording(observations: np.ndarray, index: np.ndarray, step: np.ndarray, reward: np.ndarray) -> np.ndarray:
        sizes.append(len(index))
        assert observations.dtype == reward.dtype == np.float32
        assert index.dtype == step.dtype == np.int64
        for i, s in zip(index.tolist(), step.tolist(), strict=True):
            seen.setdefault(i, []).append(s)
        return act(observations, index, step, reward)

    with EnvPool(2, parallel=6, make=f"{toys}:make") as pool:
        results = pool.run(requests_for(["plain"], 7, 3, max_steps=9), recording, calls.append)
        assert pool.run([], act, calls.append) == []
    assert max(sizes) == 3
    assert {i: list(range(result.length)) for i, result in enumerate(results)} == seen
    assert list(dict.fromkeys(number for number in calls if number)) == list(range(1, 8))


def test_an_interrupt_ends_the_workers_also_in_a_thread(toys: str, is_running: Callable[[int], bool]) -> None:
    pool = EnvPool(2, parallel=4, make=f"{toys}:make")
    pids: list[int] = []

    def interrupted(*arguments: np.ndarray) -> np.ndarray:
        pids[:] = pool.pids
        raise KeyboardInterrupt

    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            pool.run(requests_for(["plain"], 4, 0), interrupted)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(pids) == 2
    assert not any(is_running(pid) for pid in pids)


def test_suites_run_in_the_same_pool() -> None:
    def recording(observations: np.ndarray, *_: np.ndarray) -> np.ndarray:
        if observations.shape[1] == 39:
            assert not observations[:, 36:39].any(), "the goal is hidden"
        return np.sin(observations[:, : 4 if observations.shape[1] == 39 else 3])

    with EnvPool(1, goal_visible=False, parallel=2) as pool:
        pool.run([EpisodeRequest("disassemble", 1, max_steps=3)], recording)
        results = pool.run([EpisodeRequest("hopper", seed, max_steps=1000) for seed in (0, 1)], recording)
    assert all(0 < result.length < 1000 and result.episode_return > 0 and not result.success for result in results)


def test_a_stopped_worker_leaves_no_trace_in_the_results(
    toys: str, tmp_path: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLMDPD_STEP_SECONDS", "2")
    requests = [*requests_for(["sleep"], 5, fresh_seed), EpisodeRequest(f"stop-once@{tmp_path / 'f'}", fresh_seed, 30)]
    with EnvPool(2, parallel=6, make=f"{toys}:make") as pool:
        assert content(pool.run(requests, act)) == alone(toys, requests)
        assert [death.silent for death in pool.deaths] == [2.0]
    assert "no answer within 2 s" in caplog.text


def test_an_episode_that_stops_every_worker_is_named(toys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMDPD_STEP_SECONDS", "1")
    monkeypatch.setenv("LLMDPD_EPISODE_SECONDS", "3")
    requests = [*requests_for(["sleep"], 3, 0), EpisodeRequest("stop-always", 4242, 500)]
    with (
        EnvPool(1, parallel=8, make=f"{toys}:make") as pool,
        pytest.raises(WorkerError, match=r"3 workers died in the episode of task stop-always, seed 4242.*no answer"),
    ):
        pool.run(requests, act)


def test_a_stop_is_heard_while_a_worker_is_silent(toys: str, is_running: Callable[[int], bool]) -> None:
    with EnvPool(1, parallel=2, make=f"{toys}:make") as pool:
        pids: list[int] = []

        def progress(done: int) -> None:
            pids[:] = pool.pids
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pool.run([EpisodeRequest("stop-always", 1, 500)], act, progress)
        assert len(pids) == 1
        assert not is_running(pids[0])
