"""Mirrored run folders: whole states alone, one worker at a time, on a local disk and on a server of S3."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmdpd.errors import InputError
from llmdpd.experiments import mirror as module
from llmdpd.experiments import mirrored
from llmdpd.experiments.cell import Share
from llmdpd.experiments.executors import LOST, LocalExecutor, Resources, Running
from llmdpd.experiments.executors.local import LocalStep
from llmdpd.experiments.mirror import Mirror, TakenOverError
from llmdpd.experiments.scheduler import Scheduler
from llmdpd.experiments.stores import UnreachableError, open_store
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.files import atomic_directory, process_lock

Files = dict[str, str]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3, with the bucket `bucket`; see `s3_server`."""
    pytest.importorskip("pyarrow")
    from s3_server import serving

    with serving("bucket") as address:
        yield address


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return s3_url(request.getfixturevalue("s3"), f"bucket/{tmp_path.name}/")


def s3_url(address: str, place: str) -> str:
    return f"s3://{place}?region=us-east-1&scheme=http&endpoint_override={address}"


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")


def write(folder: Path, files: Files) -> Path:
    """A folder with these files and no others."""
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        file.unlink()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


FIRST = {"config.json": "{}", "metrics.jsonl": "1\n", "checkpoint/step-00000010/state.json": "ten", "a/b/copy": "{}"}
SECOND = {"config.json": "{}", "metrics.jsonl": "1\n2\n", "checkpoint/step-00000020/state.json": "twenty"}


@pytest.fixture
def disks(tmp_path: Path) -> Callable[[int], Path]:
    """The run folder on one machine's disk or another's."""
    return lambda number: tmp_path / f"disk{number}" / "run"


def test_another_machine_gets_the_last_state(url: str, disks: Callable[[int], Path]) -> None:
    mine, other = Mirror(url), Mirror(url)
    other.fetch(disks(1))
    assert not disks(1).exists(), "nothing is mirrored yet"
    write(disks(0), {**FIRST, ".lock": "1"})
    mine.claim(disks(0))
    other.fetch(disks(1))
    assert read(disks(1)) == FIRST
    assert other.iterations("run") == 10
    write(disks(0), SECOND)
    mine.push(disks(0))
    other.fetch(disks(1))
    assert read(disks(1)) == SECOND
    assert (other.iterations("run"), other.iterations("another")) == (20, 0)
    # What no state needs any more is not kept.
    store = open_store(url)
    mine.push(disks(0))
    assert sorted(store.names("run")) == ["manifest-00000002.json", "manifest-00000003.json"]
    assert len(store.names("run/files")) == len(SECOND)
    # What this machine did since is not undone.
    write(disks(0), {**SECOND, "more": "than that"})
    mine.fetch(disks(0))
    assert (disks(0) / "more").exists()


def test_a_worker_finds_the_folder_by_the_mirrors_url(tmp_path: Path) -> None:
    """Steps are given `Mirror.url`."""
    for number, name in enumerate(("two words", "größe", "50%", "a?b#c", "%20")):
        store = open_store((tmp_path / name).as_uri())
        store.write("key", b"value")
        assert (tmp_path / name / "key").is_file()
        assert open_store(store.url).url == store.url
        assert open_store(store.url).read("key") == b"value"
        assert len(os.listdir(tmp_path)) == number + 1
    open_store(f"file://{tmp_path}/two words").write("other", b"")
    assert sorted(os.listdir(tmp_path / "two words")) == ["key", "other"]


def test_a_state_that_is_half_written_does_not_count(
    url: str, disks: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Mirror(url)
    mine.claim(write(disks(0), FIRST))
    write(disks(0), SECOND)

    def fail(key: str, data: bytes) -> None:
        raise OSError("the line is cut")

    store = mine._store.write
    monkeypatch.setattr(mine._store, "write", lambda key, data: (fail if "manifest" in key else store)(key, data))
    with pytest.raises(OSError, match="the line is cut"):
        mine.push(disks(0))
    Mirror(url).fetch(disks(1))
    assert read(disks(1)) == FIRST
    monkeypatch.setattr(mine._store, "write", store)
    mine.push(disks(0))
    Mirror(url).fetch(disks(1))
    assert read(disks(1)) == SECOND


def test_of_two_workers_the_former_one_is_refused(url: str, disks: Callable[[int], Path]) -> None:
    former, latter = Mirror(url), Mirror(url)
    former.claim(write(disks(0), FIRST))
    latter.claim(disks(1))
    write(disks(0), {"config.json": "of the former"})
    with pytest.raises(TakenOverError):
        former.push(disks(0))
    latter.push(write(disks(1), SECOND))
    Mirror(url).fetch(disks(2))
    assert read(disks(2)) == SECOND


def test_of_two_that_write_at_once_one_goes_on(tmp_path: Path, disks: Callable[[int], Path]) -> None:
    url = f"file://{tmp_path}/store"
    former, latter = Mirror(url), Mirror(url)
    former.claim(write(disks(0), FIRST))
    known = former._newest("run")
    latter.claim(disks(1))
    # It looked for the newest state before it was taken over.
    former._replace(write(disks(0), SECOND), known)
    with pytest.raises(TakenOverError):
        latter.push(disks(1))
    former.push(disks(0))
    Mirror(url).fetch(disks(2))
    assert read(disks(2)) == SECOND


def test_a_folder_of_another_origin_is_not_replaced(tmp_path: Path, disks: Callable[[int], Path]) -> None:
    url = f"file://{tmp_path}/store"
    Mirror(url).claim(write(disks(0), FIRST))
    write(disks(1), {"config.json": "of another run"})
    with pytest.raises(InputError, match="not the one that is mirrored"):
        Mirror(url).fetch(disks(1))
    assert read(disks(1)) == {"config.json": "of another run"}
    Mirror(url).fetch(write(disks(1), FIRST))  # a copy


@pytest.mark.parametrize("what", ["altered", "missing", "no JSON", "no manifest", "../outside", "/outside"])
def test_damage_is_told(what: str, tmp_path: Path, disks: Callable[[int], Path]) -> None:
    mirror = Mirror(f"file://{tmp_path}/store")
    mirror.claim(write(disks(0), FIRST))
    (manifest,) = (tmp_path / "store" / "run").glob("manifest-*")
    content = next((tmp_path / "store" / "run" / "files").iterdir())
    if what == "altered":
        content.write_text("something else")
    elif what == "missing":
        content.unlink()
    elif what == "no JSON":
        manifest.write_text("{")
    else:
        manifest.write_text(
            "[]" if what == "no manifest" else f'{{"owner": "a", "files": {{"{what}": "{content.name}"}}}}'
        )
    with pytest.raises(InputError, match=r"damaged|not JSON") as caught:
        mirror.fetch(disks(1))
    assert "store/run" in str(caught.value.path)
    assert not disks(1).exists()
    assert not (tmp_path / "disk1" / "outside").exists()


def test_a_place_that_is_none(
    disks: Callable[[int], Path], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("nowhere://bucket/folder", "runs", "s3://", "file://runs", "s3://key:secret@bucket/runs"):
        with pytest.raises(InputError) as caught:
            Mirror(url)
        assert caught.value.field == "--mirror"
        assert "secret" not in str(caught.value)
    (tmp_path / "file").touch()
    for url in (s3_url(s3, "no-such-bucket/runs"), f"file://{tmp_path}/file"):
        with pytest.raises(InputError, match="cannot be reached"):
            Mirror(url).claim(write(disks(0), FIRST))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=re.escape("llmdpd[s3]")):
        Mirror("s3://bucket/runs")


def test_a_copy_is_of_one_moment(disks: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run writes its next checkpoint while its files are linked."""
    folder, link = write(disks(0), FIRST), module._link

    def slow(file: Path, place: Path) -> None:
        link(file, place)
        if (folder / "checkpoint/step-00000010").exists():
            write(folder, SECOND)
            (folder / "checkpoint/step-00000010").rmdir()

    monkeypatch.setattr(module, "_link", slow)
    with module._copy(folder) as copy:
        assert read(copy) == SECOND
        assert copy.exists()
        Mirror(f"file://{tmp_path}/store").claim(folder)
        assert not copy.exists(), "as one that a kill left"


@pytest.mark.parametrize("number", [0, 1])
def test_a_copy_has_no_folder_half_of_before_and_half_of_after(
    number: int, disks: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run replaces a policy while its files are linked; no checkpoint tells that."""
    old, new = ({f"policy_best/{name}": f"{name} {age}" for name in ("a", "b")} for age in ("old", "new"))
    folder, link, links = write(disks(0), old), module._link, list[Path]()

    def slow(file: Path, place: Path) -> None:
        if len(links) == number:
            with atomic_directory(folder / "policy_best") as temporary:
                write(temporary, {Path(name).name: text for name, text in new.items()})
        links.append(file)
        link(file, place)

    monkeypatch.setattr(module, "_link", slow)
    with module._copy(folder) as copy:
        assert read(copy) == new


def test_a_folder_that_a_kill_left_between_two_names_is_mirrored(tmp_path: Path, disks: Callable[[int], Path]) -> None:
    folder = write(disks(0), FIRST)
    (folder / "a").rename(folder / ".a.0123456789abcdef.old")
    Mirror(f"file://{tmp_path}/store").claim(folder)
    Mirror(f"file://{tmp_path}/store").fetch(disks(1))
    assert read(disks(1)) == FIRST


def test_a_folder_that_a_lost_step_is_at_work_in_is_not_replaced(tmp_path: Path, fake_cell: Callable[..., Any]) -> None:
    """Where both machines are one: what is mirrored just now is no news to it."""
    fetched: list[Path] = []
    mirror: Any = SimpleNamespace(fetch=fetched.append)
    cell = fake_cell(tmp_path / "work", "")
    scheduler = Scheduler([cell], LocalExecutor(Resources(1, 1, "cpu")), tmp_path, StopSignals(), mirror=mirror)
    with process_lock(cell.folder / ".lock", pytest.fail):  # type: ignore[arg-type]
        scheduler._fetch(cell)
        assert fetched == []
    scheduler._fetch(cell)
    assert fetched == [cell.folder]


class Elsewhere(LocalExecutor):
    """Each step runs on a machine of its own, on whose disk nothing is; the first one is lost after it has ended."""

    count = 0

    def start(self, argv: list[str], share: Share, log: Path) -> Running:  # type: ignore[override]
        disk, lost = log.parents[2] / f"machine{self.count}", self.count == 0
        self.count += 1
        (disk / "logs").mkdir(parents=True)
        moved = [word.replace(str(log.parents[1]), str(disk)) for word in argv]
        step = super().start(moved, share, disk / "logs" / log.name)

        def poll() -> int | str | None:
            return LOST if lost and step.poll() is not None else step.poll()

        return SimpleNamespace(poll=poll, is_queued=step.is_queued, stop=step.stop, wait=step.wait)  # type: ignore[return-value]


def test_a_cell_goes_on_on_another_machine(fake_cell: Callable[..., Any], tmp_path: Path) -> None:
    work = """
folder.mkdir(exist_ok=True)
checkpoint = folder / "checkpoint" / "step-00000010"
print("goes on" if checkpoint.exists() else "begins")
if checkpoint.exists(): (folder / "done").touch()
checkpoint.mkdir(parents=True, exist_ok=True)
(checkpoint / "state.json").write_text("ten")
"""
    cell, logs = fake_cell(tmp_path / "head" / "work", work), tmp_path / "head" / "logs"
    executor = Elsewhere(Resources(1, threads=1, device="cpu"))
    mirror = Mirror(f"file://{tmp_path}/store")
    (outcome,) = Scheduler([cell], executor, logs, StopSignals(), mirror=mirror).execute()
    assert outcome.failed_step is None, outcome.log_tail
    assert executor.count == 2
    assert (tmp_path / "head" / "work" / "checkpoint" / "step-00000010" / "state.json").read_text() == "ten"
    lines = [line for line in (logs / "work.log").read_text().splitlines() if line in ("begins", "goes on")]
    assert lines == ["begins", "goes on"]
    assert os.listdir(tmp_path / "machine0" / "work") == ["checkpoint"], "it has a disk of its own"


class Silent:
    """A method of the mirror that does not reach the store the first times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
        self.left, answer = times, getattr(Mirror, name)

        def call(mirror: Mirror, *arguments: Any) -> Any:
            if self.left:
                self.left -= 1
                raise UnreachableError("mirrored runs cannot be reached", path="s3://b", field="--mirror")
            return answer(mirror, *arguments)

        monkeypatch.setattr(Mirror, name, call)


@pytest.mark.parametrize("name", ["fetch", "read_log"])
def test_a_store_that_does_not_answer_for_a_while_delays(
    name: str,
    fake_cell: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmdpd.experiments.scheduler.SECONDS_BETWEEN_QUESTIONS", 0.01)
    silent, poll, ends = Silent(monkeypatch, name, times=4), LocalStep.poll, []

    def watched(step: LocalStep) -> int | None:
        code = poll(step)
        if code is not None:
            ends.append(code)
        return code

    monkeypatch.setattr(LocalStep, "poll", watched)
    cells = [fake_cell(tmp_path / "head" / f"work{n}", 'folder.mkdir(); (folder / "done").touch()') for n in range(2)]
    executor = LocalExecutor(Resources(1, threads=1, device="cpu"))
    mirror = Mirror(f"file://{tmp_path}/store")
    outcomes = Scheduler(cells, executor, tmp_path / "head" / "logs", StopSignals(), mirror=mirror).execute()
    assert [outcome.failed_step for outcome in outcomes] == [None, None], [each.log_tail for each in outcomes]
    assert silent.left == 0
    assert ends == [0, 0], "a look at a step that has ended may have effects"
    assert capsys.readouterr().out.count("It is asked again") == 1


def test_a_store_that_never_answers_ends_the_experiment(
    fake_cell: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmdpd.experiments.scheduler.SECONDS_BETWEEN_QUESTIONS", 0.01)
    monkeypatch.setattr("llmdpd.experiments.scheduler.PATIENCE_SECONDS", 0.3)
    Silent(monkeypatch, "fetch", times=10**6)
    executor = LocalExecutor(Resources(1, threads=1, device="cpu"))
    mirror = Mirror(f"file://{tmp_path}/store")
    with pytest.raises(UnreachableError):
        Scheduler([fake_cell(tmp_path / "work", "")], executor, tmp_path, StopSignals(), mirror=mirror).execute()


def test_what_a_step_has_done_is_not_given_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmdpd.experiments.mirrored.SECONDS_BETWEEN_QUESTIONS", 0.01)
    silent, mirror = Silent(monkeypatch, "push", times=3), Mirror(f"file://{tmp_path}/store")
    folder = write(tmp_path / "run", FIRST)
    mirror.claim(folder)
    write(folder, SECOND)
    mirrored._patiently(lambda: mirror.push(folder), [])
    assert silent.left == 0
    assert capsys.readouterr().err.count("asked again") == 3
    other = tmp_path / "other" / "run"
    other.parent.mkdir()
    Mirror(mirror.url).fetch(other)
    assert read(other) == SECOND
    # A stop that was asked for does not wait.
    silent.left = 1
    with pytest.raises(UnreachableError):
        mirrored._patiently(lambda: mirror.push(folder), [signal.SIGTERM])
