"""Every benchmark from its command line to its JSON, at sizes that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import act
import gpu
import pytest
import retrieval
import sampler
import scale
import torch
import train_step
from workloads import diffusion_ql

from llmdpd.errors import InputError
from llmdpd.ops import native

QUICK = ("--quick", "--threads", "1")


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    """The commands own their process."""
    path, threads, environment = list(sys.path), torch.get_num_threads(), os.environ.get("PYTHONPATH")
    yield
    sys.path[:] = path
    torch.set_num_threads(threads)
    native.set_threads(None)
    assert os.environ.get("PYTHONPATH") == environment


def run(main: Callable[[list[str]], int], file: Path, *words: str) -> dict[str, Any]:
    assert main([*QUICK, *words, "--json", str(file)]) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["limits"]["fp32"]["flops_per_second"] > 0
    assert not any(row["failed"] for row in report["rows"])
    for row in report["rows"]:
        assert (row["seconds"] is None) == (row["reason"] is not None)
        assert row["flops"] > 0
    return report


def measured(report: dict[str, Any]) -> set[str]:
    return {row["backend"] for row in report["rows"] if row["seconds"] is not None}


def test_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(sampler.main, tmp_path / "x.json", "--plot", str(tmp_path / "x.png"))
    assert {"eager", "compile", "reference", "cpp"} == measured(report)
    cases = {(row["case"]["direction"], row["case"]["precision"]) for row in report["rows"]}
    assert cases == {(d, p) for d in ("forward", "forward+backward") for p in ("fp32", "bf16")}
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert "× compile" in capsys.readouterr().out


def test_sampler_measures_the_combinations_that_are_named() -> None:
    def cases(*words: str) -> list[sampler.Case]:
        return sampler.cases_of(sampler.parser().parse_args(words))

    named = cases("--batches", "2", "3", "--steps", "4", "--precisions", "fp32", "--directions", "forward")
    assert named == [sampler.Case("forward", 2, 4, "fp32"), sampler.Case("forward", 3, 4, "fp32")]
    assert len(cases("--full")) == 2 * 5 * 4 * 2
    assert len(cases("--full", "--batches", "256")) == 2 * 4 * 2
    assert cases() == list(sampler.DEFAULT["cpu"])


def test_activations_that_do_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "free_memory", lambda device: 2**20)
    case = sampler.Case("forward+backward", 64, 5, "fp32")
    device = torch.device("cpu")
    work = sampler.Workload(case, sampler.Sizes(5, 3, 4, 64), device, sampler.Compiler(device, "eager"))
    for backend in ("eager", "compile", "reference"):
        with pytest.raises(sampler.NotHere, match="GiB"):
            work.make(backend)
    work.make("cpp")


def test_train_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(train_step.main, tmp_path / "x.json")
    assert {"eager", "compile", "ours", "one after another", "at once"} == measured(report)
    sizes = {row["case"]["size"] for row in report["rows"]}
    assert sizes == {"default", "diffusion-ql", "llmdpd", "diffusion-ql, 8 seeds"}
    assert "iterations a second" in capsys.readouterr().out


def test_iterations_from_a_graph_are_counted_and_a_capture_that_fails_is_a_dash() -> None:
    """The seam to `llmdpd.training.cuda_graph`, whose own tests are elsewhere."""
    device = torch.device("cpu")
    training = diffusion_ql(sampler.Sizes(5, 3, 0, 16), device, 4, 2)
    with pytest.raises(sampler.NotHere, match="CUDA device"):
        train_step.graphed(training)
    seen: list[int] = []

    class Module:
        @staticmethod
        def with_cuda_graph(learner: Any, mode: str, place: torch.device) -> Any:
            assert (learner, mode, place) == (training.learner, "on", device)
            return types.SimpleNamespace(update=lambda batch, iteration: seen.append(iteration))

    first = training.iteration
    call = train_step.graph_call(Module, training)
    captured = len(seen)
    assert captured > 3  # the graph is there before anything is timed
    call()
    assert seen == list(range(first, first + captured + 1))

    def broken(*_: Any) -> None:
        raise InputError("can't be captured", found="it waits")

    Module.with_cuda_graph = staticmethod(lambda *_: types.SimpleNamespace(update=broken))  # type: ignore[assignment]
    with pytest.raises(sampler.NotHere, match="can't be captured: it waits"):
        train_step.graph_call(Module, training)


def test_act(tmp_path: Path) -> None:
    report = run(act.main, tmp_path / "x.json")
    assert {"eager", "compile", "ours"} == measured(report)
    assert {row["case"]["B"] for row in report["rows"]} == {1, 2}
    assert all(row["seconds"]["p99"] > 0 for row in report["rows"] if row["seconds"])


def test_on_a_gpu_an_action_is_timed_from_a_graph_too() -> None:
    made = act.ours(lambda graph: lambda: graph, torch.device("cuda"))  # type: ignore[arg-type, return-value]
    assert {name: make()() for name, make in made.items()} == {"ours": False, "ours, graph": True}
    policy, calls = retrieval.policy(True, torch.device("cpu")), []
    assert retrieval.captured(lambda: calls.append(1), policy, False)  # type: ignore[arg-type, return-value]
    assert not calls
    with pytest.raises(RuntimeError, match="no CUDA graph"):
        retrieval.captured(lambda: calls.append(1), policy, True)  # type: ignore[arg-type, return-value]
    assert len(calls) == 5


def gpu_run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "deep" / "gpu.json"
    status = gpu.main(["--device", "cpu", "--quick", "--no-build", "--json", str(file), *words])
    return status, json.loads(file.read_text())


def test_gpu_command_end_to_end_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = gpu_run(tmp_path, "--tests", "tests/ops/test_philox.py")
    assert (status, report["errors"], report["left_out"]) == (0, [], [])
    assert report["tests"]["ok"] is True
    assert set(report["reports"]) == {"sampler", "train_step", "act", "kernels"}
    assert all(part["rows"] for part in report["reports"].values())
    assert any(check["passed"] for check in report["checks"])
    assert report["machine"]["device"] == "cpu"
    assert report["seconds"] < 480
    assert "tolerances:" in capsys.readouterr().out


def test_gpu_command_stops_starting_when_the_time_is_up(tmp_path: Path) -> None:
    status, report = gpu_run(tmp_path, "--budget", "5")
    assert (status, report["left_out"], report["reports"]) == (0, ["everything"], {})


def test_gpu_command_reports_what_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "measure", lambda *_: 1 / 0)
    status, report = gpu_run(tmp_path, "--tests", "tests/nothing")
    assert status == 1
    assert report["errors"] == ["training iteration: ZeroDivisionError: division by zero"]
    assert set(report["reports"]) == {"sampler", "act", "kernels", "train_step"}
    kept = {row["case"]["size"] for row in report["reports"]["train_step"]["rows"]}
    assert kept == {"default"}, "what is measured before is not lost"
    assert report["tests"]["ok"] is None


def test_gpu_command_builds_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a folder of its own; a build that fails is the end, and its last words are kept."""
    asked: list[list[str]] = []

    def fake(words: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        return subprocess.CompletedProcess(words, 1, "no compiler")

    monkeypatch.setattr(gpu.subprocess, "run", fake)
    monkeypatch.setenv("PYTHONPATH", "")
    status = gpu.main(["--device", "cpu", "--quick", "--json", str(tmp_path / "x.json")])
    monkeypatch.undo()
    report = json.loads((tmp_path / "x.json").read_text())
    assert status == 1
    assert report["build"]["output"] == "no compiler"
    assert report["reports"] == {}
    (words,) = asked
    assert {"--no-deps", "--no-build-isolation", "--target"} <= set(words)


def test_a_command_that_takes_too_long_is_stopped() -> None:
    found = gpu._run([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"], 3.0)
    assert found["ok"] is False
    assert "begun" in found["output"]
    assert "stopped after" in found["output"]


@pytest.mark.parametrize("main", [sampler.main, train_step.main, act.main])
def test_wrong_options_end_with_a_line(main: Callable[[list[str]], int]) -> None:
    for words in (
        ["--threads", "0"],
        ["--seconds", "-1"],
        *([["--device", "cuda"]] if not torch.cuda.is_available() else []),
    ):
        with pytest.raises(SystemExit):
            main([*QUICK[:1], *words])


def test_seeds_at_once(tmp_path: Path) -> None:
    words = ("--seeds", "2", "--batch", "4", "--turns", "2", "--iterations", "1", "--quick")
    assert scale.main([*words, "--json", str(tmp_path / "x.json")]) == 0
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["same_bits"]
    assert report["seconds"]["ratio"]["median"] > 0
