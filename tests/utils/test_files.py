"""Writing whole or not at all: exceptions, a disk that is full, a kill between the two renames."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmdpd.errors import InputError
from llmdpd.utils import files
from llmdpd.utils.files import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    atomic_writer,
    each_record,
    file_sha256,
    process_lock,
    read_json,
    recover_directory,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.txt"
    atomic_write_text(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    atomic_write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    atomic_write_json(path, {"b": [1, None, "ä"]})
    assert read_json(path) == {"b": [1, None, "ä"]}
    assert path.read_text().endswith("\n")
    assert names(path.parent) == ["a.txt"]


def test_a_result_is_as_readable_as_any_file_and_folder(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a", "")
        with atomic_directory(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1, float("-inf")]}, {"a": object()}])
def test_what_is_not_json_is_refused_before_the_file_is_touched(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises((ValueError, TypeError)):
        atomic_write_json(path, value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def no_space(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    from llmdpd.utils.files import atomic_directory, atomic_write_bytes

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    folder = Path(sys.argv[1])
    for number in range(2):
        try:
            if number:
                with atomic_directory(folder / "run") as temporary:
                    (temporary / "small").write_bytes(b"new")
                    (temporary / "large").write_bytes(bytes(200_000))
            else:
                atomic_write_bytes(folder / "a.bin", bytes(200_000))
        except OSError as error:
            print("refused", error.errno)
"""


def test_a_write_that_the_system_cuts_short_keeps_the_old_ones(tmp_path: Path) -> None:
    """A real limit of the operating system: the data is written in part, then the write fails."""
    (tmp_path / "a.bin").write_bytes(b"old")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "small").write_bytes(b"old")
    script = textwrap.dedent(FULL_DISK)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n")[:2] == [f"refused {errno.EFBIG}"] * 2
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path / "run") == ["small"]
    assert (tmp_path / "run" / "small").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin", "run"]


def test_what_another_user_left_half_written_does_not_refuse_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /tmp, where only their owner may remove files; the id is beyond any process's."""
    left = tmp_path / f".page.html.{files._PID_SPACE}-99999999-0123abcd.tmp"
    left.write_text("theirs")
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == left:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    atomic_write_text(tmp_path / "page.html", "mine")
    assert names(tmp_path) == sorted([left.name, "page.html"])


def test_process_ids_of_another_container_are_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers of one host's name that write into one folder: the other's live ids may be nobody's here."""
    assert files._pid_space() == files._PID_SPACE
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert files._pid_space() != files._PID_SPACE


def test_a_folder_that_vanishes_while_it_is_looked_through_has_nothing_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(path: Path) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "iterdir", vanish)
    recover_directory(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_a_folder_is_written_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.v1"
    with atomic_directory(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not path.exists()
    assert (path / "sub" / "a").read_text() == "1"
    with atomic_directory(path) as temporary:
        (temporary / "b").write_text("2")
        assert (path / "sub" / "a").read_text() == "1"
    assert names(path) == ["b"]
    assert names(path.parent) == ["run.v1"]


def test_recovery_keeps_out_of_folders_of_longer_names(tmp_path: Path) -> None:
    """`run.best` that a kill left under its temporary name is neither `run`'s to delete nor to take."""
    left = tmp_path / ".run.best.abcd1234.old"
    left.mkdir()
    (left / "a").write_text("best")
    recover_directory(tmp_path / "run")
    assert names(tmp_path) == [left.name]
    with atomic_directory(tmp_path / "run") as temporary:
        (temporary / "a").write_text("run")
    assert (left / "a").read_text() == "best"
    recover_directory(tmp_path / "run.best")
    assert (tmp_path / "run.best" / "a").read_text() == "best"


HOLDER = """
    import sys, time
    from llmdpd.utils.files import process_lock

    def busy(holder):
        raise SystemExit(f"held by {holder}")
    with process_lock(sys.argv[1], busy):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(path), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_keeps_others_out_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    holder = hold(path, 0.5)
    seen: list[int | None] = []
    with process_lock(path, seen.append):
        assert holder.wait(60) == 0, "the lock came before it was free"
        assert int(path.read_text()) == os.getpid()
    holder.communicate()
    assert holder.pid in seen
    assert set(seen) <= {holder.pid, None}
    assert names(tmp_path / "deep") == []


def test_a_lock_is_free_when_its_holder_is_killed(tmp_path: Path) -> None:
    holder = hold(tmp_path / "lock", 600)
    holder.kill()
    holder.communicate()
    assert names(tmp_path) == ["lock"]
    with process_lock(tmp_path / "lock", lambda pid: pytest.fail(f"held by {pid}")):
        pass
    assert names(tmp_path) == []


def test_whoever_waits_may_give_up(tmp_path: Path) -> None:
    def give_up(pid: int | None) -> None:
        raise InputError("busy", found=pid)

    with process_lock(tmp_path / "lock", give_up):
        with pytest.raises(InputError) as error, process_lock(tmp_path / "lock", give_up):
            pass
        assert error.value.found == os.getpid()
        assert names(tmp_path) == ["lock"]


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with process_lock(tmp_path / "lock", lambda pid: None):
        pass
    assert "no locks" in caplog.text
    with atomic_directory(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("size", [0, 1, 1 << 22, (1 << 22) + 7])
def test_the_hash_of_a_file_of_any_size(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "f").write_bytes(content)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def write_file(path: Path, text: str, failure: BaseException | None) -> None:
    with atomic_writer(path) as temporary:
        temporary.write_text(text)
        if failure:
            raise failure


def write_folder(path: Path, text: str, failure: BaseException | None) -> None:
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text(text)
        if failure:
            raise failure


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("failure", ["RuntimeError", "KeyboardInterrupt", "fsync", "replace 0", "replace 1"])
def test_a_failed_write_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None], failure: str
) -> None:
    """An exception inside, a full disk at the fsync or at either rename of a folder."""
    path = tmp_path / "run"
    write(path, "old", None)
    raised = {"RuntimeError": RuntimeError(), "KeyboardInterrupt": KeyboardInterrupt()}.get(failure)
    if failure == "fsync":
        monkeypatch.setattr(files.os, "fsync", no_space)
    elif failure.startswith("replace"):
        real, calls = os.replace, iter(range(10))
        wanted = int(failure[-1]) if write is write_folder else 0
        monkeypatch.setattr(files.os, "replace", lambda *a: no_space() if next(calls) == wanted else real(*a))
    with pytest.raises(type(raised) if raised else OSError, match=None if raised else "No space"):
        write(path, "new", raised)
    monkeypatch.undo()
    assert (path if write is write_file else path / "a").read_text() == "old"
    assert names(tmp_path) == ["run"]


BETWEEN_THE_RENAMES = """
    import os, sys, time
    from llmdpd.utils import files

    real, calls = os.replace, iter(range(10))
    def replace(source, target):
        if next(calls) == 1:
            print("between", flush=True)
            if sys.argv[2] == "killed":
                os._exit(9)
            time.sleep(0.5)
        real(source, target)
    files.os.replace = replace
    with files.atomic_directory(sys.argv[1]) as temporary:
        (temporary / "a").write_text("new")
"""


def writer_between_the_renames(path: Path, end: str) -> subprocess.Popen[str]:
    write_folder(path, "old", None)
    command = [sys.executable, "-c", textwrap.dedent(BETWEEN_THE_RENAMES), str(path), end]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "between\n"
    return writer


@pytest.mark.parametrize("name", ["run", "run.v1", "run[1]*?"])
def test_a_kill_between_the_renames_is_recovered(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with writer_between_the_renames(path, "killed") as writer:
        assert writer.wait() == 9
    assert not path.exists()
    for _ in range(2):
        recover_directory(path)
        assert (path / "a").read_text() == "old"
    with writer_between_the_renames(path, "killed"):
        pass
    with atomic_directory(path) as temporary:  # the next write recovers too
        assert (path / "a").read_text() == "old"
        (temporary / "b").write_text("new")
    assert names(path) == ["b"]
    assert not list(tmp_path.glob(".*.old"))


def test_a_writer_between_the_renames_is_not_taken_for_a_killed_one(tmp_path: Path) -> None:
    with writer_between_the_renames(tmp_path / "run", "slow") as writer:
        recover_directory(tmp_path / "run")
        assert (tmp_path / "run" / "a").read_text() == "new"
        assert writer.wait() == 0
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "not found"),
        (b'{"a": 1', "not JSON"),
        (b"\xff\xfe\x00", "not a text"),
        (b"", "not JSON"),
        ("folder", "not a regular file"),
        ("fifo", "not a regular file"),
    ],
)
def test_read_json_names_the_file(tmp_path: Path, content: bytes | str | None, problem: str) -> None:
    path = tmp_path / "a.json"
    if isinstance(content, str):
        (os.mkfifo if content == "fifo" else os.mkdir)(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as error:
        read_json(path)
    assert error.value.path == str(path)
    if isinstance(content, bytes):
        with pytest.raises(InputError, match="a file is where a folder") as error, atomic_directory(path):
            pass
        assert (error.value.path, path.read_bytes()) == (str(path), content)


CROWD = """
    import sys
    from pathlib import Path
    from llmdpd.utils import files

    files._LOCK_POLL_SECONDS = 0.0001
    lock, counter = Path(sys.argv[1]) / "lock", Path(sys.argv[1]) / "counter"
    for _ in range(100):
        with files.process_lock(lock, lambda pid: None):
            value = int(counter.read_text())
            counter.write_text(str(value + 1))
"""


def test_no_two_hold_a_lock_that_is_removed_and_made_anew(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    command = [sys.executable, "-c", textwrap.dedent(CROWD), str(tmp_path)]
    crowd = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in crowd] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "300"
    assert names(tmp_path) == ["counter"]


KILLED = """
import os, signal, sys
from llmdpd.utils.files import atomic_directory, atomic_writer
writers = [kind(os.path.join(sys.argv[1], kind.__name__)) for kind in (atomic_writer, atomic_directory)]
for writer in writers:
    writer.__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmdpd.utils.files._cleaned", set())
    with atomic_writer(tmp_path / "at work") as mine:
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
        left = [path for path in tmp_path.iterdir() if path != mine]
        assert len(left) == 2
        others = tmp_path / ".other.0123abcd-1-89abcdef.tmp"  # of another machine, which shares the folder
        others.touch()
        monkeypatch.setattr("llmdpd.utils.files._cleaned", set())
        atomic_write_text(tmp_path / "next", "whole")
        assert set(tmp_path.iterdir()) == {mine, others, tmp_path / "next"}


@pytest.mark.parametrize("letter", ["a", "ü"])
def test_the_longest_names_can_be_written(tmp_path: Path, letter: str) -> None:
    path = tmp_path / (letter * (254 // len(letter.encode())))
    atomic_write_text(path, "whole")
    with atomic_directory(tmp_path / (letter * (250 // len(letter.encode())))) as folder:
        (folder / "file").touch()
    assert path.read_text() == "whole"


def test_what_is_no_regular_file_is_written_not_replaced(tmp_path: Path) -> None:
    fifo, link, target = tmp_path / "fifo", tmp_path / "link", tmp_path / "target"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    atomic_write_text(fifo, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert fifo.is_fifo()
    link.symlink_to(target)
    for text in ("new", "newer"):
        atomic_write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text("/dev/full", "nowhere")
    assert Path("/dev/full").is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link", "target"]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 5000, '{"a": NaN}', "[-Infinity]", "[1e999]", "1" + "0" * 400, "[1", "\x00", ""]
)
def test_what_is_no_json_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "a.json")
    assert error.value.path == str(tmp_path / "a.json")
    if "NaN" in text:
        assert str(read_json(tmp_path / "a.json", finite=False)["a"]) == "nan"


def test_damaged_lines_cost_themselves_only(tmp_path: Path) -> None:
    lines = [
        '{"iteration": 1, "a": 1}',
        "[" * 100_000,
        "null",
        '{"a": 1}',
        '{"iteration": 1e400}',
        '{"iteration": true}',
        "\ud800",
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join([*lines, '{"iteration": 2, "a": 3}']).encode(errors="surrogatepass"))
    damaged: list[str] = []
    assert [record["iteration"] for record in each_record(path, damaged.append)] == [1, 2]
    assert len(damaged) == 6


def test_text_that_is_no_unicode_is_written_as_json_has_it(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a", "ä\ud800")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ä\\ud800"


def test_the_last_iteration_of_a_metrics_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert files.last_iteration(file) == 0
    file.write_text('{"iteration": 40, "loss": 1.0}\n{"iteration": 60}\n{"iterat')
    assert files.last_iteration(file) == 60, "the last line is not whole yet"
    file.write_text("no record\n")
    assert files.last_iteration(file) == 0
