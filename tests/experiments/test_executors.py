"""Steps on a Ray cluster and on submitit's stand-in for Slurm: ends, logs, stops, and nodes that die."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmdpd.errors import InputError
from llmdpd.experiments.cell import Share
from llmdpd.experiments.executors import LOST, Resources, Running, make_executor
from llmdpd.experiments.executors.base import Executor
from llmdpd.experiments.executors.slurm import _option
from llmdpd.experiments.plan import Plan
from llmdpd.experiments.scheduler import Scheduler
from llmdpd.experiments.worker import Worker
from llmdpd.training.stopping import StopSignals

WaitUntil = Callable[..., None]
WAIT = """
import os, signal, sys, time
from pathlib import Path
folder = Path({folder!r})
signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(0)))
(folder / "writing").write_text(str(os.getpid()))
(folder / "writing").rename(folder / "begun")
time.sleep(120)
"""


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def ended(step: Running, wait_until: WaitUntil) -> int | str | None:
    found: list[int | str] = []

    def look() -> bool:
        code = step.poll()
        found.extend([] if code is None else [code])
        return bool(found)

    wait_until(look)
    return found[0]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of a head without cores and a node with one; executors join what is initialised."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(params=["ray", "slurm"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "ray":
        request.getfixturevalue("cluster")
        return make_executor("ray", Resources())
    pytest.importorskip("submitit")
    return make_executor("slurm", Resources(options=("cluster=local",)))


def test_a_step_ends_with_its_code_and_leaves_its_output(
    executor: Executor, tmp_path: Path, wait_until: WaitUntil
) -> None:
    log = tmp_path / "cell.log"
    assert executor.shares(3) == [Share(1)] * 3
    step = executor.start(script("import sys; print('out'); sys.exit(7)"), Share(1), log)
    assert ended(step, wait_until) == 7
    assert log.read_text() == "out\n"


def test_a_stop_reaches_what_runs(executor: Executor, tmp_path: Path, wait_until: WaitUntil) -> None:
    step = executor.start(script(WAIT.format(folder=str(tmp_path))), Share(1), tmp_path / "cell.log")
    wait_until((tmp_path / "begun").exists)
    step.stop()
    step.wait()
    wait_until((tmp_path / "saved").exists)


def test_a_step_whose_node_dies_is_lost_and_its_process_ends(
    cluster: Any, tmp_path: Path, wait_until: WaitUntil
) -> None:
    executor = make_executor("ray", Resources())
    node = cluster.add_node(num_cpus=2)
    step = executor.start(script(WAIT.format(folder=str(tmp_path))), Share(2), tmp_path / "cell.log")
    wait_until((tmp_path / "begun").exists)
    assert step.poll() is None
    cluster.remove_node(node, allow_graceful=False)
    assert ended(step, wait_until) == LOST
    # Nothing of it goes on in the way of the next.
    process = int((tmp_path / "begun").read_text())
    wait_until(lambda: not exists(process))


def test_a_cell_whose_node_dies_loses_no_more_than_to_its_checkpoint(
    cluster: Any, make_test_plan: Callable[..., Plan], train: Any, contents: Any, tmp_path: Path
) -> None:
    """The node dies with all that is on it; on the next one the run comes to the same bits as one without Ray."""
    (cell,) = make_test_plan(seeds=1, only=("full",), executor="ray", threads=2).runnable
    node, log, state = cluster.add_node(num_cpus=2), tmp_path / "logs" / f"{cell.name}.log", {"at": 0, "process": 0}

    class KillNode(StopSignals):
        def check(self) -> None:
            if not state["at"] and cell.iterations_done:
                state["process"] = int((cell.folder / ".lock").read_text())
                os.kill(state["process"], signal.SIGSTOP)
                state["at"] = cell.progress[0]
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=2)
            elif state["process"] and "was lost" in log.read_text():
                with suppress(ProcessLookupError):  # Ray may have done so
                    os.kill(state["process"], signal.SIGKILL)
                state["process"] = 0

    executor = make_executor("ray", Resources(threads=2))
    (outcome,) = Scheduler([cell], executor, log.parent, KillNode()).execute()
    assert outcome.failed_step is None, outcome.log_tail
    (resumed,) = re.findall(r"resumed from \S+ at iteration (\d+)", log.read_text())
    assert int(resumed) >= state["at"] - cell.config.training.checkpoint_every
    assert cell.state == "done"
    words = make_test_plan(seeds=1, only=("full",), out=tmp_path / "alone").runnable[0].next_step(Share(1)).words
    assert train(*words[1:]) == 0
    by_ray, alone = contents(cell.folder), contents(tmp_path / "alone" / cell.name)
    assert {**by_ray, "config": None} == {**alone, "config": None}


def test_a_local_ray_keeps_its_workers_for_the_next_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Ray's own part is played: a second Ray beside the module's cluster cannot be started in one process."""
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    made: list[Any] = []

    def remote(**needs: object) -> Callable[..., Any]:
        def call(work: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=work)

        def make() -> Any:
            worker = Worker()
            made.append(SimpleNamespace(run=call(worker.run), stop=call(worker.stop), __ray_ready__=call(lambda: True)))
            return made[-1]

        return lambda kind: SimpleNamespace(remote=make)

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    executor = make_executor("ray", Resources(threads=2))
    assert executor.shares(9) == [Share(2)] * 2, "no more than there are cores"
    for code in (3, 0, 5):
        assert executor.start(script(f"import sys; sys.exit({code})"), Share(2), tmp_path / "log").poll() == code
    assert len(made) == 1
    with pytest.raises(InputError, match="fewer cores") as caught:
        make_executor("ray", Resources(threads=5)).shares(1)
    assert caught.value.field == "--threads"


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, resources, field in (
        ("rey", Resources(), "--executor"),
        ("local", Resources(options=("a=1",)), "--slurm"),
        ("slurm", Resources(options=("partition",)), "--slurm"),
    ):
        with pytest.raises(InputError) as caught:
            make_executor(name, resources)
        assert caught.value.field == field
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, extra in (("ray", "llmdpd[ray]"), ("slurm", "llmdpd[slurm]")):
        with pytest.raises(InputError, match=re.escape(extra)):
            make_executor(name, Resources())


def test_slurms_options_are_whole_numbers_or_words() -> None:
    for words, value in (
        ("a=12", 12),
        ("a=01:00", "01:00"),
        ("a=", ""),
        ("a=b=c", "b=c"),
        ("a=²", "²"),
        ("a=" + "9" * 5000, "9" * 5000),
    ):
        assert _option(words) == ("a", value)


def test_no_parameter_of_submitit(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    executor = make_executor("slurm", Resources(options=("cluster=local", "colour=red")))
    with pytest.raises(InputError) as caught:
        executor.start(script(""), Share(1), tmp_path / "cell.log")
    assert caught.value.field == "--slurm"
    assert "colour" in caught.value.problem
