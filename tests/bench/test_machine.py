"""The measured limit, and what is read of the machine."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def peak_rate() -> Callable[..., float | None]:
    """The benchmarks' own compiled function, built here where it is not yet."""
    module = machine.peak_rate_module()
    if isinstance(module, str):
        pytest.skip(module)
    rate: Callable[..., float | None] = module.peak_rate
    return rate


def test_peak_rates(peak_rate: Callable[..., float | None]) -> None:
    best = peak_rate("fp32", 1, 0.01)
    assert best is not None
    assert best > 0
    for isa in ("plain", "avx2", "avx512"):
        rate = peak_rate("fp32", 1, 0.01, isa)
        assert rate is None or rate > 0
    # What no CPU has is None.
    assert peak_rate("bf16", 1, 0.01, "avx2") is None
    assert peak_rate("fp32", 1, 0.01, "avx512_bf16") is None


@pytest.mark.parametrize(
    "arguments", [("fp16", 1, 0.1), ("fp32", 0, 0.1), ("fp32", 1, 0.0), ("fp32", 1, float("nan")), ("fp32", 1, 1e9)]
)
def test_peak_rate_refuses_what_makes_no_sense(peak_rate: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"precision|threads|seconds"):
        peak_rate(*arguments)


def test_without_the_peak_rate_module_the_limit_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*command: Any, **_: Any) -> None:
        raise FileNotFoundError("no cmake")

    monkeypatch.setattr(machine, "_BUILT", Path("nowhere"))
    monkeypatch.setattr(machine.subprocess, "run", fail)
    machine.peak_rate_module.cache_clear()
    try:
        assert machine.measure_limit(CPU, "fp32") is None
        assert "needs cmake, pybind11 and a C++ compiler (no cmake)" in machine.how_limit(CPU, "fp32")
    finally:
        machine.peak_rate_module.cache_clear()


def test_the_highest_measurement_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([3.0, None, 5.0, None, 4.0, None])
    monkeypatch.setattr(machine, "measure_limit", lambda *_: next(rates))
    limits = machine.Limits(CPU)
    limits.measure()
    limits.measure()
    found = limits.report()
    assert (found["fp32"]["flops_per_second"], found["fp32"]["measured"]) == (5.0, [3.0, 5.0, 4.0])
    assert found["bf16"]["flops_per_second"] is None


def test_the_best_window_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([2.0, 7.0, 3.0])
    stand_in = types.SimpleNamespace(peak_rate=lambda precision, threads, seconds: next(rates))
    monkeypatch.setattr(machine, "peak_rate_module", lambda: stand_in)
    assert machine.measure_limit(CPU, "fp32", windows=3) == 7.0


def test_scripts_load_on_a_machine_with_the_core_alone(bench_folder: Path) -> None:
    """PyTorch, NumPy and safetensors, and nothing of what the extras install."""
    absent = (
        "huggingface_hub tyro rich jinja2 matplotlib imageio tensorboard h5py minari gymnasium metaworld "
        "mujoco transformers pytest"
    )
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent.split()!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(bench_folder)!r})
import act, gpu, sampler, tolerances, train_step, torch
from counting import Sizes
from workloads import metaworld
metaworld(Sizes(), torch.device("cpu"), quick=False).update()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_description_names_no_place_on_this_machine() -> None:
    metadata = machine.describe(CPU)
    assert metadata["llmdpd"]["from"] in ("checkout", "installed")
    assert str(Path.home()) not in str(metadata)
    assert str(machine.ROOT) not in str(metadata)


def test_what_others_take_of_the_cpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy, all, own ticks: of 100 the machine was busy for 70, of which this process was for 20."""
    ticks = iter([(1000.0, 5000.0, 300.0), (1070.0, 5100.0, 320.0)])
    monkeypatch.setattr(machine, "_cpu_ticks", lambda: next(ticks))
    assert machine.Others().share() == pytest.approx(0.5)


def test_own_work_is_not_that_of_others() -> None:
    before = machine._cpu_ticks()
    assert before is not None
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    after = machine._cpu_ticks()
    assert after is not None
    assert 0 < after[2] - before[2] <= after[1] - before[1]
    assert after[0] - before[0] <= after[1] - before[1]
