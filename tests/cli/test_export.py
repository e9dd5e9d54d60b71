"""The export command: a run's policy and its prompts, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.cli.export import main
from llmdpd.export.container import HEADER
from llmdpd.runs.folder import RunFolder

Capture = pytest.CaptureFixture[str]
Export = Callable[..., int]
SEEN, UNSEEN = "reach-v3", "door-lock-v3"


@pytest.fixture
def export(cache_home: Path, torch_settings: None) -> Export:
    return lambda *words: main([str(word) for word in words])


def test_a_run_is_exported_with_a_prompt_for_each_task(run_copy: Path, export: Export, capsys: Capture) -> None:
    assert export(run_copy, "--task", "reach", "door-lock", "--sampler", "ddim", "--steps", 1) == 0
    folder = run_copy / "export-cpp"
    out = capsys.readouterr().out
    assert f"export: {folder}" in out.replace("\n", "")
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {
        *("CMakeLists.txt", "example.cpp", "export.json", "llmdpd_policy.cpp", "llmdpd_policy.h", "policy.llmdpd"),
        *(f"prompts/{task}.llmdpd" for task in (SEEN, UNSEEN)),
    }
    assert all(Path(name).name in out for name in files)
    said = json.loads((folder / "export.json").read_text())
    assert (said["to"], said["prompts"], said["acting"]["steps"]) == ("cpp", [SEEN, UNSEEN], 1)
    headers = [HEADER.unpack_from(file.read_bytes()) for file in sorted(folder.rglob("*.llmdpd"))]
    assert len({header[4] for header in headers}) == 1  # of one policy
    assert said["acting"]["track_after"] == 3
    assert all(b"track.ends" in file.read_bytes() for file in (folder / "prompts").iterdir())
    # Again, which replaces it.
    assert export(run_copy, "--task", "reach", "--checkpoint", "best", "--track-after", 0) == 0
    assert b"track." not in (folder / "prompts" / f"{SEEN}.llmdpd").read_bytes()
    assert [file.stem for file in (folder / "prompts").iterdir()] == [SEEN]


def test_the_policys_own_numbers_are_written_whatever_its_prompt(run_copy: Path, export: Export) -> None:
    out = run_copy / "a"
    words = (run_copy, "--task", "reach", "--out")
    assert export(*words, out) == 0
    first, prompt = (out / "policy.llmdpd").read_bytes(), (out / "prompts" / f"{SEEN}.llmdpd").read_bytes()
    text = run_copy / "text.txt"
    text.write_text(json.loads((run_copy / "prompts.json").read_text())[UNSEEN]["text"])
    assert export(*words, out, "--prompt-text", text, "--demonstration", RunFolder(run_copy).prompts) == 0
    assert (out / "policy.llmdpd").read_bytes() == first
    assert (out / "prompts" / f"{SEEN}.llmdpd").read_bytes() != prompt
    assert export(*words, out, "--noise-scale", 0.5) == 0
    assert (out / "policy.llmdpd").read_bytes() != first


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["no task to export for", "--task"]),
        (["--task", "push-back"], ["no demonstration of this task", "push-back-v3"]),
        (["--task", "reach", "--noise", "seed"], ["C++ always makes its noise of a seed"]),
        (["--task", "reac"], ["unknown task", "reach-v3"]),
        (["--task", "reach", "--precision", "bf16"], ["float32", "bf16"]),
        (["--task", "reach", "--sampler", "ddpm", "--steps", "1"], ["ddpm walks every training step"]),
        (["--task", "reach", "--steps", "999"], ["steps"]),
        (["--task", "reach", "--to", "rust"], ["--to"]),
        (["--task", "reach", "--out", "{run}"], ["a folder of other files"]),
        (["--task", "reach", "--out", "{run}/config.json"], ["a file is where a folder is to be written"]),
        (["--task", "reach", "--action-horizon", "7"], ["action_horizon"]),
        (["--task", "reach", "--demonstrations", "17"], ["demonstrations", "1 to 16"]),
        (["--task", "reach", "--prompts", "no-trajectory", "--demonstrations", "2"], ["no effect", "--demonstrations"]),
        (["--task", "reach", "--prompts", "no-trajectory", "--demonstration", "a"], ["no effect", "--prompt-data"]),
        (
            ["--task", "reach", "--prompts", "no-text", "--contradicted-text", "drop"],
            ["no effect with --prompts no-text"],
        ),
        (["--task", "reach", "--to", "onnx", "--action-horizon", "1"], ["--to onnx gives whole chunks"]),
        (["--task", "reach", "--to", "torch", "--action-horizon", "1"], ["--to torch gives whole chunks"]),
        (["--task", "reach", "--to", "onnx", "--track-after", "1"], ["--to onnx keeps no state"]),
        (["--task", "reach", "--prompts", "no-trajectory", "--track-after", "1"], ["no effect", "--track-after"]),
    ],
)
def test_what_cannot_be_exported_is_refused(
    words: list[str], expected: list[str], run_copy: Path, export: Export, capsys: Capture
) -> None:
    before = sorted(run_copy.rglob("*"))
    assert export(run_copy, *(word.format(run=run_copy) for word in words)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert all(word in said for word in expected), said
    assert "--together" not in said
    assert "--prompt-behaviours" not in said
    assert sorted(run_copy.rglob("*")) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, export: Export, capsys: Capture) -> None:
    assert export(tmp_path, "--task", "reach") == 2
    assert "not a run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_a_task_says_how_near_it_is(run_copy: Path, export: Export, capsys: Capture) -> None:
    assert export(run_copy, "--task", "reach", "push", "--to", "torch", "--noise", "seed") == 0
    folder = run_copy / "export-torch"
    assert {file.name for file in folder.iterdir()} == {"export.json", f"{SEEN}.pt2", "push-v3.pt2"}
    said, printed = json.loads((folder / "export.json").read_text()), capsys.readouterr()
    for task in (SEEN, "push-v3"):
        assert 0 < said["checked"][task]["difference"] < 1e-5
        assert f"{task}: within" in printed.out
    assert "Warning" not in printed.err


@pytest.mark.slow
def test_prompts_that_a_policy_does_not_read_are_left_out(
    tmp_path: Path, train: Callable[..., int], tiny_options: list[str], export: Export
) -> None:
    words = (*tiny_options, "--method.network.context.no-text", "--method.eta", 0, "--training.iterations", 5)
    assert train("--run-dir", tmp_path / "run", *words) == 0
    assert export(tmp_path / "run", "--task", "reach") == 0
