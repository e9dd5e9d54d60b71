"""One command for a machine with a GPU: build, check every tolerance, measure everything, one JSON; within 8 minutes.

    python bench/gpu.py --json bench/results/gpu-NAME.json

Needs torch, triton, numpy, pybind11, scikit-build-core, cmake and a C++ compiler; no network, and nothing else of what
llmdpd depends on (acting needs safetensors, the tests pytest; where they are missing the JSON says so). The package is
built into a folder of its own, so that nothing on the machine changes. The JSON is written anew after each stage: what
is there when time or machine run out is kept. `--device cpu --quick` proves the command itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESERVE = 10.0  # seconds kept back for the last report
# Then captured iterations and actions, for which more of what llmdpd depends on has to be here.
_CAPTURED = ("tests/methods/test_device_work.py", "tests/policy/test_device_action.py")
TESTS = ("tests/kernels", "tests/ops", "tests/diffusion", *_CAPTURED, "tests/training")


def build(target: Path, seconds: float) -> dict[str, Any]:
    """Build and install this checkout's package into `target`."""
    words = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    return _run([*words, "--target", str(target), str(ROOT)], seconds)


def run_tests(paths: Sequence[str], seconds: float) -> dict[str, Any]:
    """The project's own tests of sampler and kernels, where pytest is here."""
    there = [path for path in paths if (ROOT / path).exists()]
    if importlib.util.find_spec("pytest") is None:
        return {"ok": None, "reason": "pytest is not installed here"}
    if not there:
        return {"ok": None, "reason": f"none of {', '.join(paths)} is in this checkout"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-rs"]
    words += ["--continue-on-collection-errors", *there]
    return _run(words, seconds)


def _run(words: Sequence[str], seconds: float) -> dict[str, Any]:
    """`ok`, `seconds`, and the end of what a command said; `ok` is False too where the time did not suffice."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=max(seconds, 1.0)
        )
        ok, said = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        ok, said = False, f"{said}\nstopped after {seconds:.0f} s"
    return {"ok": ok, "seconds": time.monotonic() - started, "output": said[-4000:]}


class Session:
    """The stages, one after the other, and the JSON that grows with them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.started = time.monotonic()
        self.report: dict[str, Any] = {
            "format": 1,
            "bench": "gpu",
            "device": arguments.device,
            "quick": arguments.quick,
        }
        self.report |= {"build": None, "checks": [], "tests": None, "reports": {}, "left_out": [], "errors": []}

    def left(self) -> float:
        """Seconds that stages may still take."""
        return self.arguments.budget - RESERVE - (time.monotonic() - self.started)

    def write(self) -> None:
        """The JSON as it is now, whole or not at all."""
        self.report["seconds"] = time.monotonic() - self.started
        path: Path = self.arguments.json
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(self.report, indent=2, allow_nan=False) + "\n")
        os.replace(temporary, path)

    def stage(self, name: str, work: Callable[[], None], needs: float = 5.0) -> None:
        """Run a stage where time is left for it. One that breaks doesn't take the others with it, but is reported."""
        if self.left() < needs:
            self.report["left_out"].append(name)
            return
        print(f"== {name}, {self.left():.0f} s left", flush=True)
        try:
            work()
        except Exception as error:
            self.report["errors"].append(f"{name}: {type(error).__name__}: {error}"[:2000])
            print(f"{name} broke: {error}", flush=True)
        self.write()

    @property
    def failed(self) -> bool:
        """Whether anything was wrong: a tolerance, a test, an implementation, a stage."""
        report = self.report
        rows = [row for part in report["reports"].values() for row in part["rows"]]
        wrong = any(check["passed"] is False for check in report["checks"]) or any(row["failed"] for row in rows)
        return (
            wrong
            or bool(report["errors"])
            or any((report[part] or {}).get("ok") is False for part in ("build", "tests"))
        )


def measure(session: Session) -> None:
    """Checks and benchmarks, in the order of what would be missed most. The package is importable from here on."""
    # Not at the top: they import llmdpd, which is only built when the command runs.
    import act
    import device_times
    import sampler
    import tolerances
    import torch
    import train_step
    from common import Bench, Deadline
    from counting import Sizes
    from machine import describe
    from peers import Compiler
    from report import print_report
    from timing import QUICK, Budget

    from llmdpd.utils.cores import usable_cores

    arguments, quick = session.arguments, session.arguments.quick
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device here")
    device = torch.device(arguments.device)
    torch.set_num_threads(1 if quick else usable_cores())
    seed = secrets.randbits(31)
    torch.manual_seed(seed)
    session.report |= {"seed": seed, "machine": describe(device)}
    deadline = Deadline(session.left())
    compiler = Compiler(device, "eager" if quick else "inductor")
    sizes = Sizes(state=5, action=3, prompt=8, hidden=16) if quick else Sizes()
    budget = QUICK if quick else Budget(seconds=1.0)
    benches = {
        name: Bench(name, device, budget, {"quick": quick}, deadline)
        for name in ("sampler", "train_step", "act", "kernels")
    }
    cases = sampler.cases_of(sampler.parser().parse_args([f"--device={device}", *(["--quick"] if quick else [])]))
    own: Any = "triton" if device.type == "cuda" else "cpp"

    def checks() -> None:
        found = tolerances.check_all(device, [own], quick, Deadline(min(120.0, deadline.left() / 3)))
        tolerances.print_checks(found)
        session.report["checks"] = [check.values() for check in found]

    def keep(name: str) -> None:
        session.report["reports"][name] = benches[name].report()

    def sample(chosen: Sequence[Any]) -> None:
        sampler.measure(benches["sampler"], chosen, sizes, sampler.backends_of(device), compiler)
        keep("sampler")

    def default() -> None:
        train_step.measure_default(benches["train_step"], quick)
        keep("train_step")

    def train() -> None:
        train_step.measure(benches["train_step"], sizes, compiler, ("fp32", "bf16"), quick)
        train_step.measure_seeds(benches["train_step"], sizes, ("fp32", "bf16"), quick)
        keep("train_step")

    def latency() -> None:
        act.measure(
            benches["act"], sizes, compiler, ("fp32",) if quick else ("fp32", "bf16"), (1,) if quick else (1, 64)
        )
        keep("act")

    def default_latency() -> None:
        act.measure_default(benches["act"], compiler, (1,) if quick else (1, 64))
        keep("act")

    def alone() -> None:
        device_times.measure(benches["kernels"], sizes, (2, 3) if quick else device_times.BATCHES)
        keep("kernels")

    def tests() -> None:
        session.report["tests"] = run_tests(arguments.tests, min(120.0, session.left() / 2))

    session.stage("tolerances", checks)
    session.stage("sampler, the floors' cases", lambda: sample(cases[:3]))
    session.stage("kernels alone", alone)
    session.stage("the default preset's iteration", default)
    session.stage("training iteration", train)
    session.stage("acting, the default policy", default_latency)
    session.stage("acting", latency)
    session.stage("tests", tests, needs=20.0)
    session.stage("sampler, the other cases", lambda: sample(cases[3:]))
    for report in session.report["reports"].values():
        print_report(report)


def main(words: Sequence[str] | None = None) -> int:
    """Build, check, measure, write; 0, or 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that it runs, no figures")
    parser.add_argument("--no-build", action="store_true", help="use the llmdpd that is installed")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="test folders to run")
    session = Session(parser.parse_args(words))
    with tempfile.TemporaryDirectory(prefix="llmdpd-bench-") as folder:
        if not session.arguments.no_build:
            session.report["build"] = build(Path(folder), session.left())
            session.write()
            print(
                session.report["build"]["output"][-2000:] if not session.report["build"]["ok"] else "built", flush=True
            )
            # First on the path, here and in the tests' process.
            sys.path.insert(0, folder)
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        if session.report["build"] is None or session.report["build"]["ok"]:
            session.stage("everything", lambda: measure(session))
    session.write()
    _conclude(session)
    return 1 if session.failed else 0


def _conclude(session: Session) -> None:
    report = session.report
    held = [check["passed"] for check in report["checks"]]
    print(f"tolerances: {held.count(True)} held, {held.count(False)} not held, {held.count(None)} could not be run")
    if report["tests"] is not None:
        print("tests:", report["tests"].get("reason") or report["tests"]["output"].strip().splitlines()[-1])
    left = report["left_out"] + [case for part in report["reports"].values() for case in part["left_out"]]
    print(f"left out, the time was up: {'; '.join(left) or 'nothing'}")
    print(f"{report['seconds']:.0f} s; {session.arguments.json}")


if __name__ == "__main__":
    raise SystemExit(main())
