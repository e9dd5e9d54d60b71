"""Running cells: several at once, failures apart, a stop passed on, and how long it takes.

Short scripts stand in for the commands.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmdpd.errors import InputError, StopRequestedError
from llmdpd.experiments.cell import Cell, Share, Step
from llmdpd.experiments.durations import Durations
from llmdpd.experiments.executors import LOST, Resources, Running, local, make_executor
from llmdpd.experiments.executors.local import LocalExecutor
from llmdpd.experiments.plan import Plan
from llmdpd.experiments.scheduler import Scheduler
from llmdpd.experiments.worker import start_process
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.files import process_lock

PATIENCE = 60.0


MakeCell = Callable[[str, str], Any]
MakePlan = Callable[..., Plan]
Finish = Callable[..., None]

COUNTS = {"reach-v3": 4, "push-v3": 2, "door-lock-v3": 1}
DONE = "(folder / 'done').touch()"


def scheduler(cells: list[Any], parts: int, folder: Path, stop: StopSignals | None = None) -> Scheduler:
    executor = LocalExecutor(Resources(parts, threads=1, device="cpu"))
    return Scheduler(cells, executor, folder / "logs", stop or StopSignals())


def test_a_failed_cell_does_not_stop_the_others(cell: MakeCell, tmp_path: Path) -> None:
    bad = cell("bad", "print('what went wrong', file=sys.stderr)\nsys.exit(3)")
    good = [cell(f"good{number}", DONE) for number in range(2)]
    outcomes = {o.cell.name: o for o in scheduler([bad, *good], 1, tmp_path).execute()}
    assert outcomes["bad"].failed_step == "work"
    assert outcomes["bad"].log_tail.endswith("what went wrong")
    for name in ("good0", "good1"):
        assert outcomes[name].failed_step is None
        assert (tmp_path / name / "done").exists()


def test_a_cell_that_is_done_runs_nothing_and_an_idle_step_is_not_repeated(cell: MakeCell, tmp_path: Path) -> None:
    finished = cell("finished", "raise SystemExit('ran')")
    (finished.folder / "done").touch()
    (outcome,) = scheduler([finished], 1, tmp_path).execute()
    assert outcome.reused
    assert not (tmp_path / "logs").exists()
    (outcome,) = scheduler([cell("idle", "")], 1, tmp_path).execute()
    assert outcome.failed_step == "work"


def test_as_many_run_at_once_as_there_are_shares(cell: MakeCell, tmp_path: Path) -> None:
    """Two wait for each other, so they can only end if both run; marks of presence show that never a third did."""
    meet = """
other = folder.parent / {other!r} / "here"
(folder / "here").touch()
deadline = time.monotonic() + 50
while not other.exists():
    assert time.monotonic() < deadline
    time.sleep(0.01)
present = [f.name for f in folder.parent.iterdir() if (f / "here").exists() and not (f / "done").exists()]
(folder / "present").write_text(" ".join(present))
"""
    pairs = [("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")]
    cells = [cell(name, meet.format(other=other) + DONE) for name, other in pairs]
    outcomes = scheduler(cells, 2, tmp_path).execute()
    assert [o.failed_step for o in outcomes] == [None] * 4
    assert all(len((tmp_path / name / "present").read_text().split()) <= 2 for name, _ in pairs)


class Unsteady(LocalExecutor):
    """Its workers are lost as often as `losses` says, after what they run has ended."""

    losses = 0

    def start(self, argv: list[str], share: Share, log: Path) -> Running:  # type: ignore[override]
        step = super().start(argv, share, log)
        if self.losses == 0:
            return step
        self.losses -= 1

        def poll() -> str | None:
            return None if step.poll() is None else LOST

        return SimpleNamespace(poll=poll, is_queued=step.is_queued, stop=step.stop, wait=step.wait)  # type: ignore[return-value]


@pytest.mark.parametrize(("losses", "iterates", "ends_well"), [(4, False, True), (6, False, False), (12, True, True)])
def test_a_cell_lost_with_its_worker_goes_on_unless_it_gets_no_further(
    cell: MakeCell, tmp_path: Path, losses: int, iterates: bool, ends_well: bool
) -> None:
    iterate = "import random; (folder / f'iteration{random.random()}').touch()" if iterates else ""
    finish = f"count = len(list(folder.glob('begun*')))\nif count > {losses}: {DONE}"
    begin = "import random; (folder / f'begun{random.random()}').touch()"
    executor = Unsteady(Resources(1, threads=1, device="cpu"))
    executor.losses = losses
    work = cell("work", "\n".join((begin, iterate, finish)))
    (outcome,) = Scheduler([work], executor, tmp_path / "logs", StopSignals()).execute()
    begun = len(list(work.folder.glob("begun*")))
    if ends_well:
        assert (outcome.failed_step, begun) == (None, losses + 1)
    else:
        assert (outcome.failed_step, begun) == ("work, whose worker was lost 6 times", 6)
    assert (tmp_path / "logs" / "work.log").read_text().count("was lost") == min(losses, begun)


def test_what_was_lost_may_save_before_it_is_gone_on_with(cell: MakeCell, tmp_path: Path) -> None:
    """The lost worker's process lives on for a moment, at work in the cell, whose next worker would be refused."""
    save = f"""
import subprocess
from llmdpd.utils.files import process_lock
holder = "import sys, time; from pathlib import Path; from llmdpd.utils.files import process_lock\\n"
holder += "with process_lock(sys.argv[1], print): Path(sys.argv[2]).touch(); time.sleep(0.5)"
def refuse(holder): sys.exit("busy")
with process_lock(folder / ".lock", refuse): pass
if (folder / "begun").exists(): {DONE}; sys.exit()
subprocess.Popen([sys.executable, "-c", holder, folder / ".lock", folder / "begun"])
while not (folder / "begun").exists(): time.sleep(0.01)
"""
    executor = Unsteady(Resources(1, threads=1, device="cpu"))
    executor.losses = 1
    (outcome,) = Scheduler([cell("work", save)], executor, tmp_path / "logs", StopSignals()).execute()
    assert outcome.failed_step is None, outcome.log_tail


def test_the_state_of_all_cells(cell: MakeCell, tmp_path: Path) -> None:
    iterate = "[(folder / f'iteration{n}').touch() for n in range(5)]\nprint('as said')\n"
    cells = [
        cell("bad", "sys.exit(3)"),
        cell("done", DONE),
        cell("runs", f"{iterate}time.sleep(60)"),
        cell("waits", ""),
    ]
    seen: list[str] = []

    class Stop(StopSignals):
        def check(self) -> None:
            state = made.state()
            if state.running and state.running[0].note == "as said":
                seen.extend((*(row.state for row in (*state.failed, *state.running, *state.waiting)), *state.done))
                assert (state.running[0].progress, state.running[0].name) == ("5 of 20", "runs")
                assert state.running[0].seconds_left is not None
                assert str(state).startswith("1 done, 1 failed, 1 running, 1 waiting")
                raise StopRequestedError(2)

    made = scheduler(cells, 1, tmp_path, Stop())
    with pytest.raises(StopRequestedError):
        made.execute()
    assert seen == ["failed (work)", "work", "waiting", "done"]


def test_a_stop_is_passed_on_and_waited_for(cell: MakeCell, tmp_path: Path) -> None:
    save = """
import signal
def stop(number, frame):
    time.sleep(0.3)
    (folder / "saved").write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / "begun").touch()
time.sleep(60)
"""
    cells = [cell("one", save), cell("two", save), cell("three", save)]

    class Stop(StopSignals):
        def check(self) -> None:
            if all((c.folder / "begun").exists() for c in cells[:2]):
                raise StopRequestedError(2)

    with pytest.raises(StopRequestedError):
        scheduler(cells, 2, tmp_path, Stop()).execute()
    assert [(c.folder / "saved").exists() for c in cells] == [True, True, False]


def test_a_cell_that_another_process_works_in_is_waited_for(
    cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, free = cell("busy", DONE), cell("free", DONE)
    order: list[str] = []
    run_step = Scheduler._run_step

    def watched(self: Scheduler, cell: Cell, step: Step, share: Share, log: Path) -> Running:
        order.append(log.stem)
        return run_step(self, cell, step, share, log)

    monkeypatch.setattr(Scheduler, "_run_step", watched)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with process_lock(busy.folder / ".lock", lambda holder: None):
            held.set()
            assert release.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENCE)

    class Stop(StopSignals):
        def check(self) -> None:
            if (free.folder / "done").exists():
                release.set()

    outcomes = scheduler([busy, free], 1, tmp_path, Stop()).execute()
    thread.join()
    assert order == ["free", "busy"]
    assert [o.failed_step for o in outcomes] == [None, None]


def test_shares_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(jobs: int | None, device: str, cells: int, threads: int | None = None) -> list[Share]:
        return make_executor("local", Resources(jobs, threads, device)).shares(cells)

    monkeypatch.setattr(local, "usable_cores", lambda: 8)
    monkeypatch.setattr(local, "count_gpus", lambda: 0)
    assert shares(None, "auto", 3) == [Share(2)] * 3
    assert shares(None, "auto", 100) == [Share(1)] * 8
    assert shares(2, "cpu", 100) == [Share(4)] * 2
    assert shares(2, "cpu", 100, threads=3) == [Share(3)] * 2
    assert shares(None, "auto", 0) == [Share(8)]
    monkeypatch.setattr(local, "count_gpus", lambda: 2)
    assert shares(None, "auto", 9) == [Share(4, 0), Share(4, 1)]
    assert shares(4, "cuda", 9) == [Share(2, 0), Share(2, 1), Share(2, 0), Share(2, 1)]
    assert shares(None, "cpu", 9) == [Share(1)] * 8
    monkeypatch.setattr(local, "count_gpus", lambda: 0)
    for jobs, device, field in ((0, "auto", "--jobs"), (1, "tpu", "--device"), (1, "cuda", "--device")):
        with pytest.raises(InputError) as caught:
            shares(jobs, device, 1)
        assert caught.value.field == field
    with pytest.raises(InputError, match="threads"):
        shares(1, "cpu", 1, threads=0)


def test_each_gpu_is_given_by_its_own_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    for visible, expected in ((None, "1"), ("4,6", "6")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with (tmp_path / "log").open("w") as log:
            process = start_process([sys.executable, "-c", code], log, 1)
            assert process.wait(PATIENCE) == 0
        assert (tmp_path / "log").read_text().strip() == expected


def test_what_is_started_ends_with_its_parent(tmp_path: Path, wait_until: Callable[..., None]) -> None:
    """The parent is killed; the child gets SIGTERM, saves and ends."""
    child = f"""
import signal, sys, time
from pathlib import Path
folder = Path({str(tmp_path)!r})
signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(0)))
(folder / "begun").touch()
time.sleep(60)
"""
    parent = f"""
import sys
from llmdpd.experiments.worker import start_process
start_process([sys.executable, "-c", {child!r}], open({str(tmp_path / "log")!r}, "w")).wait()
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    wait_until((tmp_path / "begun").exists)
    process.kill()
    process.wait()
    wait_until((tmp_path / "saved").exists)


def test_a_run_takes_as_long_as_finished_ones_of_its_method_or_else_its_preset(
    make_test_plan: MakePlan, finish: Finish
) -> None:
    plan = make_test_plan()
    full, plain = plan.cells["full"], plan.cells["plain"]
    cells = [*full, *plain]
    assert Durations(cells).left(full[1]) is None
    finish(full[0], COUNTS)  # in 150 s
    assert Durations(cells).left(full[1]) == Durations(cells).left(plain[0]) == 150
    assert Durations(cells).left(dataclasses.replace(plain[0], preset="metaworld")) is None
    (full[1].folder / "checkpoint" / "step-00000050").mkdir(parents=True)
    assert Durations(cells).left(full[1]) == pytest.approx(0.75 * 150), "50 of 200 iterations are done"
    finish(plain[1], COUNTS)
    plain[1].run.note(times={"total_seconds": 50.0})
    assert Durations(cells).left(plain[0]) == 50
