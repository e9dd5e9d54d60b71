from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.cli.collect import main
from llmdpd.data.collecting import scripted

SMALL = ["--tasks", "reach", "--episodes", "3", "--max-steps", "5", "--workers", "1"]

MEDIUM = ["--tasks", "reach", "--episodes", "12", "--max-steps", "100", "--workers", "2", "--seed", "5"]


def test_the_command_writes_data_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out"), *SMALL]) == 0
    text = capsys.readouterr().out
    assert "collecting: 3 of 3" in text
    assert "reach-v3" in text
    assert "clean" in text
    content = json.loads((tmp_path / "out" / "collect.json").read_text())["content"]
    assert content in text
    assert main(["--out", str(tmp_path / "out"), *SMALL]) == 0
    assert "was there already" in capsys.readouterr().out


def test_the_last_versions_spelling_of_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out"), *SMALL, "--tail=3"]) == 0
    assert "--tail is now --post-success-steps" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "collect.json").read_text())["config"]["tail"] == 3


def test_a_wrong_input_is_one_message_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out"), "--tasks", "reech"]) == 2
    captured = capsys.readouterr()
    assert "reach-v3" in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The content of a collection that nothing stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(["--out", str(out), *MEDIUM]) == 0
    return str(json.loads((out / "collect.json").read_text())["content"])


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_collection_goes_on_to_the_same_content(
    tmp_path: Path,
    undisturbed: str,
    number: int,
    code: int,
    started: Callable[..., subprocess.Popen[str]],
    wait_until: Callable[..., None],
) -> None:
    partial = tmp_path / "out.partial"
    process = started("collect", "--out", tmp_path / "out", *MEDIUM)
    wait_until(lambda: len(list(partial.rglob("0*.npz"))) >= 2, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert not (tmp_path / "out").exists()
    kept = len(list(partial.rglob("0*.npz")))
    assert 2 <= kept < 12
    if number != signal.SIGKILL:
        assert str(partial) in text
        assert "run the same command again" in text
        assert "Traceback" not in text
    assert main(["--out", str(tmp_path / "out"), *MEDIUM]) == 0
    assert json.loads((tmp_path / "out" / "collect.json").read_text())["content"] == undisturbed
    assert not partial.exists()


def test_work_that_workers_die_of_is_one_message_that_keeps_what_was_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deadly = (
        "import os\nfrom llmdpd.tasks.demonstrators import Demonstrators\n"
        "class Deadly(Demonstrators):\n    def episode(self, request):\n"
        "        return os._exit(3) if request.behaviour == 'gaussian' else super().episode(request)\n"
    )
    (tmp_path / "llmdpd_deadly.py").write_text(deadly)
    monkeypatch.syspath_prepend(str(tmp_path))
    usual = scripted._DEMONSTRATORS
    monkeypatch.setattr(scripted, "_DEMONSTRATORS", "llmdpd_deadly:Deadly")
    out = tmp_path / "out"
    assert main(["--out", str(out), *SMALL]) == 1
    said = capsys.readouterr()
    assert "3 workers died of" in said.err
    assert "exit code 3" in said.err
    assert "Traceback" not in said.err
    assert f"finished episodes are kept in {out}.partial" in said.out
    assert list(tmp_path.glob("out.partial/*/*.npz"))
    monkeypatch.setattr(scripted, "_DEMONSTRATORS", usual)
    assert main(["--out", str(out), *SMALL]) == 0


@pytest.mark.parametrize("option", ["--episodes", "--workers"])
def test_numbers_that_would_only_fill_the_memory_are_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "out"), *SMALL, option, "99999999999"]) == 2
    assert "out of range" in capsys.readouterr().err
