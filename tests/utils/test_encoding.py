"""What a terminal's encoding lacks is written in another way; nothing that was written raises."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from llmdpd.utils.encoding import accept_any_output

TEXT = "12 – 34 … ± 5 → é 你 \udcff runs/x[/tmp]"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "12 - 34 ... +- 5 -> \\xe9 \\u4f60 \\udcff runs/x[/tmp]"),
        ("latin-1", "12 - 34 ... ± 5 -> é \\u4f60 \\udcff runs/x[/tmp]"),
        ("utf-8", "12 – 34 … ± 5 → é 你 \\udcff runs/x[/tmp]"),
    ],
)
def test_everything_can_be_written(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    accept_any_output()
    for stream in streams:
        stream.write(TEXT)
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding) == shown  # type: ignore[attr-defined]


def test_streams_that_take_everything_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    accept_any_output()
    print(TEXT)
    assert sys.stdout.getvalue() == TEXT + "\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("words", [[], ["no-such"], *([name, "--help"] for name in ("train", "collect", "evaluate"))])
def test_every_command_speaks_to_any_terminal(words: list[str], encoding: str) -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; from llmdpd.__main__ import main; sys.exit(main({words!r}))"
    environment = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert done.returncode == (2 if words == ["no-such"] else 0), done.stderr
    assert b"UnicodeEncodeError" not in done.stderr
    (done.stdout + done.stderr).decode(encoding)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "train --help", "no-such", "report nowhere"])
@pytest.mark.parametrize(
    "place", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "| true", "2>&1 | true", ">&-", "2>&-"]
)
def test_no_output_that_is_lost_changes_what_a_command_does(words: str, place: str, unbuffered: str) -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from llmdpd.__main__ import main; sys.exit(main({words.split()!r}))"
    )
    line = f'"$0" -c "$1" {place}; exit ${{PIPESTATUS[0]}}'
    environment = {"PYTHONUNBUFFERED": unbuffered, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "Exception ignored" not in done.stderr
    assert ("No space left" in done.stderr) == (place == ">/dev/full" and "--help" in words)
