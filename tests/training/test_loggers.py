"""Loggers: by the real libraries of W&B and Trackio, offline; what an interrupted run has logged is there once."""

from __future__ import annotations

import json
import sqlite3
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmdpd.config.parse import parse_train
from llmdpd.errors import InputError
from llmdpd.training.loggers import LOGGERS
from llmdpd.training.loggers.base import Logger
from llmdpd.training.metrics import MetricsWriter, read_metrics

Train = Callable[..., int]
Point = tuple[int, str, float]


def write(run: Path, iterations: range, *loggers: str, resume_at: int | None = None) -> None:
    """Losses every iteration, and a selection's value every third, as the loop does."""
    run.mkdir(exist_ok=True)
    with MetricsWriter(run, resume_at, loggers=loggers) as metrics:
        for iteration in iterations:
            metrics.write(iteration, {"loss/a": iteration / 4, "q": float(iteration)})
            if iteration % 3 == 0:
                metrics.write(iteration, {"eval/seen_success": 1 / iteration})


def write_together(runs: list[Path], logger: str) -> None:
    """Several runs of one process that take turns, as those of `--seeds`; each has losses of its own."""
    for run in runs:
        run.mkdir()
    with ExitStack() as held:
        open_ones = [held.enter_context(MetricsWriter(run, None, loggers=(logger,))) for run in runs]
        for iteration in (1, 2):
            for number, metrics in enumerate(open_ones):
                metrics.write(iteration, {"q": number + iteration / 4})


def expected_together(number: int) -> Counter[Point]:
    return Counter((iteration, "q", number + iteration / 4) for iteration in (1, 2))


def expected(last: int) -> Counter[Point]:
    losses = [(i, name, value) for i in range(1, last + 1) for name, value in (("loss/a", i / 4), ("q", float(i)))]
    return Counter([*losses, *((i, "eval/seen_success", 1 / i) for i in range(3, last + 1, 3))])


def points(records: list[Mapping[str, Any]], step: str) -> Counter[Point]:
    names = ("loss/a", "q", "eval/seen_success")
    return Counter((int(r[step]), name, float(r[name])) for r in records for name in names if name in r)


def in_float32(found: Counter[Point]) -> Counter[Point]:
    """As TensorBoard keeps them."""
    return Counter({(step, name, float(np.float32(value))): count for (step, name, value), count in found.items()})


def tensorboard_points(run: Path) -> Counter[Point]:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return Counter((event.step, name, event.value) for name in board.Tags()["scalars"] for event in board.Scalars(name))


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run's file: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def wandb_points(run: Path) -> tuple[Counter[Point], set[str], dict[str, Any]]:
    """Points, ids and the last configuration of all offline runs in the run folder."""
    found: Counter[Point] = Counter()
    ids, config = set(), {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                found += points([items], "_step")
    return found, ids, config


def trackio_points(store: Path) -> tuple[Counter[Point], set[str]]:
    base = sqlite3.connect(store / "llmdpd.db")
    rows = base.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    base.close()
    return points([json.loads(m) | {"step": step} for _, step, m in rows], "step"), {name for name, *_ in rows}


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("wandb", reason="W&B's library is not installed: pip install 'llmdpd[wandb]'")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB__DISABLE_STATS": "true"}.items():
        monkeypatch.setenv(name, value)
    return


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of its data base."""
    reason = "Trackio's library is not installed: pip install 'llmdpd[trackio]'"
    pytest.importorskip("trackio", minversion="0.20", reason=reason)
    import trackio
    import trackio.sqlite_storage
    import trackio.utils

    store = tmp_path / "store"
    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", store, raising=False)
    return store


@pytest.mark.usefixtures("wandb")
def test_wandb_continues_the_same_run(tmp_path: Path, wait_until: Callable[..., None]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 3, "method": {"lr": 0.25}}))
    write(run, range(1, 9), "wandb")
    write(run, range(6, 8), "wandb", resume_at=5)
    write(run, range(6, 11), "wandb", resume_at=5)
    files = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3
    # The library's own process writes on after `finish`.
    wait_until(lambda: all(any(r.HasField("exit") for r in wandb_records(file)) for file in files))
    found, ids, config = wandb_points(run)
    assert found == expected(10)
    assert ids == {json.loads((run / "loggers.json").read_text())["wandb"]["name"]}
    assert config["seed"] == 3
    assert config["method"]["lr"] == 0.25
    assert points(read_metrics(run / "metrics.jsonl"), "iteration") == expected(10)


@pytest.mark.usefixtures("wandb")
def test_runs_of_one_process_are_wandb_runs_of_their_own(tmp_path: Path, wait_until: Callable[..., None]) -> None:
    runs = [tmp_path / f"seed-{number}" for number in range(3)]
    write_together(runs, "wandb")
    for number, run in enumerate(runs):
        (file,) = run.glob("wandb/offline-run-*/*.wandb")
        wait_until(lambda file=file: any(record.HasField("exit") for record in wandb_records(file)))
        assert wandb_points(run)[0] == expected_together(number)


def test_trackio_continues_the_same_run(tmp_path: Path, trackio: Path) -> None:
    for place in ("a", "b"):  # two runs whose folders have the same name
        run = tmp_path / place / "run"
        run.parent.mkdir()
        write(run, range(1, 9), "trackio")
        write(run, range(6, 8), "trackio", resume_at=5)
        write(run, range(6, 11), "trackio", resume_at=5)
    found, names = trackio_points(trackio)
    assert found == expected(10) + expected(10)
    assert len(names) == 2


def test_without_wandbs_key_a_run_is_refused_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_options: list[str], refused: Callable[..., str]
) -> None:
    library = pytest.importorskip("wandb", reason="W&B's library is not installed: pip install 'llmdpd[wandb]'")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(type(library.api), "api_key", None)
    error = refused("--run-dir", tmp_path / "run", *tiny_options, "--logger", "wandb")
    assert "wandb login" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_library_that_is_not_installed_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_options: list[str], refused: Callable[..., str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    error = refused("--run-dir", tmp_path / "run", *tiny_options, "--logger", "tensorboard", name)
    assert f"pip install 'llmdpd[{name}]'" in error
    assert not (tmp_path / "run").exists()


class Memory(Logger):
    """A logger that keeps all it gets, by the name of the run, and like a remote one cannot drop anything."""

    kept: dict[str, list[dict[str, float]]]
    closed: list[bool]
    refuses: bool
    breaks: bool

    def __init__(self, run: Path, name: str, resume_at: int | None) -> None:
        if self.refuses:
            raise InputError("refused", field="training.logger")
        self._kept = self.kept.setdefault(name, [])

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        self._kept.append({"iteration": iteration, **values})

    def close(self, failed: bool) -> None:
        self.closed.append(failed)
        if self.breaks:
            raise RuntimeError("the connection is gone")


@pytest.fixture
def memory() -> Iterator[type[Memory]]:
    Memory.kept, Memory.closed, Memory.refuses, Memory.breaks = {}, [], False, False
    LOGGERS.register("memory", Memory)
    yield Memory
    LOGGERS.remove("memory")


BOTH = ("memory", "tensorboard")


def check_all_once(run: Path, memory: type[Memory], last: int) -> None:
    (kept,) = memory.kept.values()
    assert points(read_metrics(run / "metrics.jsonl"), "iteration") == expected(last)
    assert points(kept, "iteration") == expected(last)
    assert tensorboard_points(run) == in_float32(expected(last))


def test_each_record_once_whatever_stops(tmp_path: Path, memory: type[Memory]) -> None:
    run = tmp_path / "run"
    write(run, range(1, 5), *BOTH)
    write(run, range(1, 8), *BOTH)  # killed before its first checkpoint: anew
    write(run, range(4, 9), *BOTH, resume_at=3)
    write(run, range(9, 10), *BOTH, resume_at=8)
    check_all_once(run, memory, 9)


def test_killed_before_the_first_checkpoint_and_not_beyond_it(tmp_path: Path, memory: type[Memory]) -> None:
    run = tmp_path / "run"
    write(run, range(1, 8), *BOTH)
    write(run, range(1, 4), *BOTH)
    check = expected(3)
    assert points(read_metrics(run / "metrics.jsonl"), "iteration") == check
    assert tensorboard_points(run) == in_float32(check)
    write(run, range(1, 10), *BOTH)
    check_all_once(run, memory, 9)


def test_killed_twice_after_the_same_checkpoint(tmp_path: Path, memory: type[Memory]) -> None:
    run = tmp_path / "run"
    write(run, range(1, 10), *BOTH)
    write(run, range(6, 8), *BOTH, resume_at=5)
    write(run, range(6, 11), *BOTH, resume_at=5)
    check_all_once(run, memory, 10)


def test_killed_between_two_records_of_an_iteration(tmp_path: Path, memory: type[Memory]) -> None:
    run = tmp_path / "run"
    write(run, range(1, 9), *BOTH)
    with MetricsWriter(run, 8, loggers=BOTH) as metrics:
        metrics.write(9, {"loss/a": 9 / 4, "q": 9.0})
    write(run, range(6, 11), *BOTH, resume_at=5)
    check_all_once(run, memory, 10)


def test_marks_that_are_done_again_are_recorded_once(tmp_path: Path, memory: type[Memory]) -> None:
    """A checkpoint between the losses of an iteration and its selection, as a stop leaves it; then a kill."""
    run = tmp_path / "run"
    write(run, range(1, 10), *BOTH)
    with MetricsWriter(run, 9, loggers=BOTH) as metrics:
        metrics.write(9, {"eval/seen_success": 1 / 9})
    write(run, range(10, 13), *BOTH, resume_at=9)
    check_all_once(run, memory, 12)


def test_a_logger_that_is_new_gets_what_was_recorded_before(tmp_path: Path, memory: type[Memory]) -> None:
    run = tmp_path / "run"
    write(run, range(1, 7))
    assert not (run / "tensorboard").exists()
    assert not (run / "loggers.json").exists()
    write(run, range(5, 9), *BOTH, resume_at=4)
    check_all_once(run, memory, 8)


def test_a_logger_that_refused_gets_what_was_recorded_before(tmp_path: Path, memory: type[Memory]) -> None:
    run = tmp_path / "run"
    write(run, range(1, 7), "tensorboard")
    memory.refuses = True
    with pytest.raises(InputError, match="refused"):
        write(run, range(5, 9), "tensorboard", "memory", resume_at=4)
    memory.refuses = False
    write(run, range(5, 9), "tensorboard", "memory", resume_at=4)
    check_all_once(run, memory, 8)


def test_a_logger_that_refuses_a_resume_gets_nothing_twice(tmp_path: Path, memory: type[Memory]) -> None:
    run = tmp_path / "run"
    write(run, range(1, 10), *BOTH)
    for _ in range(2):
        memory.refuses = True
        with pytest.raises(InputError, match="refused"):
            write(run, range(6, 9), *BOTH, resume_at=5)
    memory.refuses = False
    write(run, range(6, 11), *BOTH, resume_at=5)
    check_all_once(run, memory, 10)


@pytest.mark.parametrize("resume_at", [5, 7, 9, 11, 12])
def test_a_logger_that_was_left_out_gets_what_it_lacks(tmp_path: Path, memory: type[Memory], resume_at: int) -> None:
    run = tmp_path / "run"
    write(run, range(1, 10), *BOTH)
    write(run, range(6, 13), resume_at=5)
    write(run, range(resume_at + 1, 15), *BOTH, resume_at=resume_at)
    check_all_once(run, memory, 14)


@pytest.mark.parametrize("lost", ["tensorboard", "loggers.json"])
def test_tensorboard_gets_all_anew(tmp_path: Path, lost: str) -> None:
    """Where its files were deleted, or are those of a version that kept no marks."""
    run = tmp_path / "run"
    write(run, range(1, 8), "tensorboard")
    (run / lost).rename(tmp_path / "elsewhere")
    write(run, range(6, 10), "tensorboard", resume_at=5)
    assert tensorboard_points(run) == in_float32(expected(9))


def test_a_run_by_name_resumed_with_another(
    tmp_path: Path, memory: type[Memory], train: Train, tiny_options: list[str]
) -> None:
    run = tmp_path / "run"
    short = [*tiny_options, "--iterations", "20", "--evaluation", "none", "--training.select-every", "0"]
    assert train("--run-dir", run, *short, "--logger", "memory") == 0
    assert not (run / "tensorboard").exists()
    assert memory.closed == [False]
    kept = [{k: v for k, v in r.items() if k != "wall_seconds"} for r in read_metrics(run / "metrics.jsonl")]
    assert list(memory.kept.values()) == [kept]
    assert [record["iteration"] for record in kept] == [10, 20]
    assert train("--resume", run, "--logger", "tensorboard") == 0
    assert len(tensorboard_points(run)) > 0


def test_a_failed_run_is_told(tmp_path: Path, memory: type[Memory]) -> None:
    with pytest.raises(KeyError), MetricsWriter(tmp_path, loggers=("memory",)):
        raise KeyError
    assert memory.closed == [True]


def test_loggers_are_closed_where_a_later_one_refuses(tmp_path: Path, memory: type[Memory]) -> None:
    class Refusing(Memory):
        refuses = True

    LOGGERS.register("refusing", Refusing)
    try:
        with pytest.raises(InputError, match="refused"):
            MetricsWriter(tmp_path, loggers=("memory", "refusing"))
    finally:
        LOGGERS.remove("refusing")
    assert memory.closed == [True]


def test_a_logger_that_cannot_be_closed_fails_no_run(
    tmp_path: Path, memory: type[Memory], caplog: pytest.LogCaptureFixture
) -> None:
    memory.breaks = True
    write(tmp_path, range(1, 4), *BOTH)
    assert memory.closed == [False]
    assert "the logger memory could not be closed: RuntimeError: the connection is gone" in caplog.text
    check_all_once(tmp_path, memory, 3)


@pytest.mark.parametrize("words", [["tensorbord"], ["tensorboard", "tensorboard"], ["none"]])
def test_wrong_names(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"training\.logger"):
        parse_train(["--logger", *words])
    assert parse_train(["--logger"]).training.logger == ()
    assert parse_train([]).training.logger == ("tensorboard",)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"wandb": 3}',
        '{"wandb": {"name": "a"}}',
        '{"wandb": {"name": "a", "given": [1], "current": true}}',
        '{"wandb": {"name": 3, "given": [1, 0], "current": true}}',
        '{"wandb": {"name": "a", "given": [1, 0], "current": 2}}',
    ],
)
def test_damaged_marks_are_named_before_a_record_is_dropped(tmp_path: Path, text: str) -> None:
    write(tmp_path, range(1, 4))
    (tmp_path / "loggers.json").write_text(text)
    with pytest.raises(InputError, match=r"loggers\.json"):
        MetricsWriter(tmp_path, loggers=())
    assert points(read_metrics(tmp_path / "metrics.jsonl"), "iteration") == expected(3)


def test_pandas_reads_a_runs_metrics_in_one_line(straight_run: Path) -> None:
    """The line of the guide; without pandas, that the file is whole lines of objects in order."""
    lines = (straight_run / "metrics.jsonl").read_text()
    assert lines.endswith("\n")
    records = [json.loads(line) for line in lines.splitlines()]
    keys = [(record["iteration"], "eval/seen_success" in record) for record in records]
    assert keys == sorted(set(keys))
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.read_json(straight_run / "metrics.jsonl", lines=True)
    assert list(frame["iteration"]) == [record["iteration"] for record in records]
    assert frame["loss/diffusion"].notna().sum() == sum("loss/diffusion" in record for record in records) > 0
