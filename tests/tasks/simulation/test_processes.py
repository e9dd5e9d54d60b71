from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.errors import InputError
from llmdpd.tasks.simulation import processes
from llmdpd.tasks.simulation.processes import Death, Worker, WorkerDiedError, WorkerError, map_unordered

IsRunning = Callable[[int], bool]


@pytest.fixture
def wait_until_gone(is_running: IsRunning) -> IsRunning:
    def wait(pid: int) -> bool:
        end = time.monotonic() + 20.0
        while is_running(pid) and time.monotonic() < end:
            time.sleep(0.02)
        return not is_running(pid)

    return wait


def ask(worker: Worker, method: str, *arguments: object) -> object:
    worker.call("tag", method, *arguments)
    tag, value = worker.receive()
    assert tag == "tag"
    return value


@pytest.fixture
def worker(toys: str):  # type: ignore[no-untyped-def]
    worker = Worker(0, f"{toys}:Probe", ("a", 1))
    yield worker
    worker.stop()


def test_a_worker_answers_in_order(worker: Worker) -> None:
    for number in range(5):
        worker.call(number, "square", number)
    assert [worker.receive() for _ in range(5)] == [(n, (("a", 1), n * n)) for n in range(5)]
    assert not worker.pending


def test_a_worker_has_one_thread_no_torch_and_the_parents_import_path(worker: Worker) -> None:
    assert ask(worker, "environment", "OMP_NUM_THREADS") == "1"
    assert ask(worker, "modules", "torch") == []
    assert "llmdpd.tasks.simulation.worker" in ask(worker, "modules", "llmdpd")  # type: ignore[operator]
    assert ask(worker, "pid") == worker.pid != os.getpid()
    assert ask(worker, "interrupt_self") == "alive", "Ctrl-C is the parent's to handle"


def test_ctrl_c_does_not_reach_a_worker_that_is_being_started(toys: str, capfd: pytest.CaptureFixture[str]) -> None:
    worker = Worker(0, f"{toys}:Probe", ())
    for _ in range(20):
        os.kill(worker.pid, signal.SIGINT)
        time.sleep(0.01)
    assert ask(worker, "square", 3) == ((), 9)
    worker.stop()
    assert "KeyboardInterrupt" not in capfd.readouterr().err


def test_an_exception_comes_home_once_with_its_traceback(worker: Worker) -> None:
    worker.call(1, "fail", "other")
    worker.call(2, "square", 3)
    with pytest.raises(WorkerError, match=r"(?s)worker 0.*Traceback.*in fail.*ArithmeticError: broken probe"):
        worker.receive()
    assert worker.receive() == (2, (("a", 1), 9))
    worker.call(3, "fail", "input")
    with pytest.raises(InputError) as caught:
        worker.receive()
    assert caught.value.field == "x"


def test_a_dead_worker_is_noticed_and_replaced(
    worker: Worker, caplog: pytest.LogCaptureFixture, wait_until_gone: IsRunning
) -> None:
    pid = worker.pid
    worker.call("first", "square", 2)
    assert worker.receive()[0] == "first"
    worker.call("second", "sleep", 60)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        worker.receive()
    assert list(worker.pending) == ["second"]
    with caplog.at_level(logging.WARNING):
        death = worker.replace()
    assert death == Death(0, pid, -signal.SIGKILL)
    assert "signal 9" in caplog.text
    assert ask(worker, "pid") == worker.pid != pid
    os.kill(worker.pid, signal.SIGKILL)
    assert wait_until_gone(worker.pid)
    worker.call("late", "square", 1)  # no error yet
    with pytest.raises(WorkerDiedError):
        worker.receive()
    assert list(worker.pending) == ["late"]


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_workers_leave_when_their_parent_is_killed(
    toys: str, busy: bool, stopped: bool, is_running: IsRunning, wait_until_gone: IsRunning
) -> None:
    code = f"""
import sys, time
sys.path[:] = {sys.path!r}
from llmdpd.tasks.simulation.processes import Worker
workers = [Worker(n, "{toys}:Probe", ()) for n in range(2)]
for worker in workers:
    worker.call(0, "pid")
    print(worker.receive()[1], flush=True)
    if {busy}:
        worker.call(0, "sleep", 0.5)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        assert all(is_running(pid) for pid in pids)
        for pid in pids if stopped else ():
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    assert all(wait_until_gone(pid) for pid in pids)


@pytest.mark.parametrize("workers", [1, 3])
def test_map_unordered_gives_every_result(toys: str, workers: int) -> None:
    results = dict(map_unordered(f"{toys}:Probe", (), "square", [(n,) for n in range(20)], workers=workers))
    assert results == {n: ((), n * n) for n in range(20)}
    assert list(map_unordered("no.such.module:thing", (), "square", [])) == []


def test_map_unordered_redoes_what_a_dead_worker_owed(toys: str, tmp_path: Path) -> None:
    items = [(str(tmp_path / f"flag{n % 3 == 0 and n}"), n) for n in range(7)]
    deaths: list[Death] = []
    results = dict(map_unordered(f"{toys}:Probe", (), "once", items, workers=1, deaths=deaths))
    assert results == {n: n for n in range(7)}
    # Items 0 and all not divisible by 3 share a flag ("flagFalse"; 0 has "flag0"): flags 0, False, 3, 6.
    assert [death.exit_code for death in deaths] == [7] * 4


def test_map_unordered_gives_up_on_a_deadly_item(toys: str) -> None:
    deaths: list[Death] = []
    with pytest.raises(RuntimeError, match=r"3 workers died of .*exit code 9"):
        list(map_unordered(f"{toys}:Probe", (), "always", [()], workers=1, deaths=deaths))
    assert len(deaths) == 3


def test_map_unordered_ends_its_workers_when_left_early_or_by_an_exception(toys: str, is_running: IsRunning) -> None:
    results = map_unordered(f"{toys}:Probe", (), "pid", [()] * 50, workers=2)
    pids = {next(results)[1] for _ in range(5)}
    results.close()  # type: ignore[attr-defined]
    busy = Worker(0, f"{toys}:Probe", ())
    busy.call(0, "sleep", 60)
    busy.stop()
    assert not any(is_running(pid) for pid in (*pids, busy.pid))
    for factory, method, problem in (
        (f"{toys}:Probe", "fail", "broken probe"),
        ("no_such_module:thing", "square", "no_such_module"),
    ):
        with pytest.raises(WorkerError, match=problem):
            list(map_unordered(factory, (), method, [("other",)] * 5, workers=2))


def test_a_stopped_worker_is_replaced_and_its_work_redone(
    toys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_running: IsRunning
) -> None:
    monkeypatch.setenv("LLMDPD_EPISODE_SECONDS", "3")
    deaths: list[Death] = []
    items = [(str(tmp_path / "flag"), n) for n in range(5)]
    with caplog.at_level(logging.WARNING):
        results = dict(map_unordered(f"{toys}:Probe", (), "stop", items, workers=2, deaths=deaths))
    assert results == {n: n for n in range(5)}
    assert [death.silent for death in deaths] == [3.0]
    assert "no answer within 3 s; it is replaced" in caplog.text
    assert not is_running(deaths[0].pid)


def test_a_hung_worker_is_given_up_after_three_tries(toys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMDPD_EPISODE_SECONDS", "1.5")
    deaths: list[Death] = []
    with pytest.raises(WorkerError, match=r"3 workers died of .*no answer within 1\.5 s; LLMDPD_STEP_SECONDS and"):
        list(map_unordered(f"{toys}:Probe", (), "hang", [()], workers=1, deaths=deaths))
    assert len(deaths) == 3


def test_waiting_for_a_stopped_worker_can_be_broken_off(toys: str, tmp_path: Path) -> None:
    calls = 0

    def waiting() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(map_unordered(f"{toys}:Probe", (), "stop", [(str(tmp_path / "flag"), 1)], workers=1, waiting=waiting))
    assert calls == 3


@pytest.mark.parametrize(("flag", "deaths"), [("once", 1), ("always", 3)])
def test_workers_that_die_at_their_start(toys: str, tmp_path: Path, flag: str, deaths: int) -> None:
    found: list[Death] = []
    results = map_unordered(f"{toys}:Stillborn", (str(tmp_path / flag),), "pid", [()], workers=1, deaths=found)
    if flag == "always":
        with pytest.raises(WorkerError, match="3 workers died"):
            list(results)
    else:
        assert len(list(results)) == 1
    assert [death.exit_code for death in found] == [5] * deaths


def test_a_worker_killed_before_it_reads_its_first_message(toys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message must not break the pipe in its parent's hands."""
    start = subprocess.Popen

    def killed(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = start(*arguments, **options)  # type: ignore[call-overload]
        process.kill()
        process.wait()
        monkeypatch.setattr(subprocess, "Popen", start)
        return process

    monkeypatch.setattr(subprocess, "Popen", killed)
    deaths: list[Death] = []
    assert list(map_unordered(f"{toys}:Probe", (), "square", [(3,)], workers=1, deaths=deaths)) == [(0, ((), 9))]
    assert [death.exit_code for death in deaths] == [-signal.SIGKILL]


def test_a_stopped_worker_that_reads_nothing_does_not_hold_its_parent(
    toys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmdpd.tasks.simulation.channel._MESSAGE_SECONDS", 1)
    stopped = Worker(1, f"{toys}:Probe", ())
    os.kill(stopped.pid, signal.SIGSTOP)
    stopped.call("tag", "square", bytes(4_000_000))
    with pytest.raises(WorkerDiedError):
        stopped.receive()
    assert stopped.stop() == -signal.SIGKILL


@pytest.mark.parametrize("said", ["soon", "0", "-1", "nan"])
def test_a_time_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("LLMDPD_STEP_SECONDS", said)
    with pytest.raises(InputError, match="no positive number"):
        processes.time_limits()
