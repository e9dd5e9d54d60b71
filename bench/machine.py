"""What the benchmarks ran on, and the most that it can do: rates measured in the same run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import llmdpd
from llmdpd.ops.build_info import build_info
from llmdpd.utils.cores import usable_cores
from llmdpd.utils.device import matmul_settings

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "bf16")
_GPU_MATRIX = {"fp32": 4096, "bf16": 8192}
_PEAK_RATE = ROOT / "bench" / "peak_rate"
_BUILT = ROOT / "build" / f"_peak_rate{sysconfig.get_config_var('EXT_SUFFIX')}"


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads, build: what figures are worth nothing without."""
    metadata: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "llmdpd": {**build_info(), "from": "checkout" if Path(llmdpd.__file__).is_relative_to(ROOT) else "installed"},
        "commit": _commit(),
        "fp32_precision": dict(zip(("cuda", "cpu"), matmul_settings(), strict=True)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        metadata["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return metadata


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    model = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = model.get("model name", platform.machine())
    return f"{name}, family {model['cpu family']} model {model['model']}" if "cpu family" in model else name


def _version(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with `+` where files differ from it; None outside of a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@lru_cache(maxsize=1)
def peak_rate_module() -> ModuleType | str:
    """The module of bench/peak_rate, built at the first use and after a change; or why it is absent. No wheel has it.

    By hand: `cmake -S . -B build/bench -DLLMDPD_BENCHMARKS=ON -DSKBUILD_PROJECT_VERSION=0
    -Dpybind11_DIR=$(python -m pybind11 --cmakedir)`, `cmake --build build/bench --target _peak_rate`, and copy
    the module to build/.
    """
    try:
        newest = max(path.stat().st_mtime for path in _PEAK_RATE.iterdir())
        if not _BUILT.exists() or _BUILT.stat().st_mtime < newest:
            _build_peak_rate()
        spec = importlib.util.spec_from_file_location("_peak_rate", _BUILT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return f"bench/peak_rate can't be built; it needs cmake, pybind11 and a C++ compiler ({said[-300:]})"


def _build_peak_rate() -> None:
    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout.strip()

    with tempfile.TemporaryDirectory() as folder:
        pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir")
        settings = {"LLMDPD_BENCHMARKS": "ON", "SKBUILD_PROJECT_VERSION": "0", "CMAKE_BUILD_TYPE": "Release"}
        settings |= {"pybind11_DIR": pybind11, "Python_EXECUTABLE": sys.executable}
        run("cmake", "-S", str(ROOT), "-B", folder, *(f"-D{name}={value}" for name, value in settings.items()))
        run("cmake", "--build", folder, "--target", "_peak_rate")
        (made,) = Path(folder).glob("bench/peak_rate/_peak_rate*")
        _BUILT.parent.mkdir(exist_ok=True)
        own = _BUILT.with_name(f"{_BUILT.name}.{os.getpid()}")
        own.write_bytes(made.read_bytes())
        own.replace(_BUILT)  # at once, whoever else builds it


def measure_limit(device: torch.device, precision: str, windows: int = 5, seconds: float = 0.05) -> float | None:
    """Operations a second that this machine can do at most; None where it has no instruction for the precision.

    On the CPU register-only multiply-adds on as many threads as torch has, the best of some windows of so many seconds;
    on a GPU a large matrix product.
    """
    if device.type == "cuda":
        return _gpu_matrix_rate(device, precision)
    module = peak_rate_module()
    if isinstance(module, str):
        return None
    rates = [module.peak_rate(precision, torch.get_num_threads(), seconds) for _ in range(windows)]
    return max((rate for rate in rates if rate is not None), default=None)


def how_limit(device: torch.device, precision: str) -> str:
    """What `measure_limit` measures, in words."""
    if device.type == "cuda":
        size = _GPU_MATRIX[precision]
        return f"torch matrix product of {size}³ in {precision}, random data, no TF32"
    module = peak_rate_module()
    if isinstance(module, str):
        return module
    instruction = "multiply-adds" if precision == "fp32" else "AVX-512 BF16 dot products; none on another CPU"
    return f"register-only {instruction}, {torch.get_num_threads()} threads"


def _gpu_matrix_rate(device: torch.device, precision: str) -> float:
    size = _GPU_MATRIX[precision]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Random numbers: products of zeros draw less power and run faster than anybody's data.
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for repetition in range(-3, 12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.matmul(a, b, out=out)
        end.record()
        torch.cuda.synchronize()
        if repetition >= 0:
            seconds.append(start.elapsed_time(end) * 1e-3)
    return 2.0 * size**3 / statistics.median(seconds)


class Limits:
    """The limits of a run, measured again and again during it.

    The highest counts: whatever else the machine has to do lowers the others, and a low limit flatters every share.
    """

    def __init__(self, device: torch.device, precisions: tuple[str, ...] = PRECISIONS) -> None:
        self._device = device
        self._seen: dict[str, list[float | None]] = {precision: [] for precision in precisions}
        self.measure()

    def measure(self, windows: int = 5) -> None:
        """Measure once more."""
        for precision, seen in self._seen.items():
            seen.append(measure_limit(self._device, precision, windows))

    def report(self) -> dict[str, Any]:
        """By precision: `flops_per_second`, every measurement, and how."""
        return {
            precision: {
                "flops_per_second": max((rate for rate in seen if rate is not None), default=None),
                "measured": seen,
                "how": how_limit(self._device, precision),
            }
            for precision, seen in self._seen.items()
        }


class Others:
    """What share of the machine's CPU time other processes took while something was measured.

    Figures from a machine that had other work are worth little, whatever their medians; this is how one sees it.
    """

    def __init__(self) -> None:
        self._before = _cpu_ticks()

    def share(self) -> float | None:
        """From the start till now, 0 … 1; None where the system doesn't say."""
        now = _cpu_ticks()
        if self._before is None or now is None:
            return None
        busy, total, own = (after - before for after, before in zip(now, self._before, strict=True))
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0 else 0.0


def _cpu_ticks() -> tuple[float, float, float] | None:
    """Busy and all ticks of the machine's cores since it started, stolen ones among the busy; ticks of this process.

    Those of its children count as its own once it has waited for them.
    """
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    ticks = [float(word) for word in words]
    used = os.times()
    own = (used.user + used.system + used.children_user + used.children_system) * os.sysconf("SC_CLK_TCK")
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks), own
