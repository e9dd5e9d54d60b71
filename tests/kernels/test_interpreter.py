"""Runs the kernels' tests on CPU tensors, under triton's interpreter, in processes of their own (see conftest.py)."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmdpd import kernels

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        "forward learners learning",
        "backward",
        "device_stack operators",
        "mlp noise choice prompt_memory",
        "reading features batches",
    ],
    ids=lambda n: n.split()[0],
)
def test_under_the_interpreter(names: str) -> None:
    """Of each process the first three seconds go by in imports: few, that take about as long as each other."""
    if kernels.interpreted():
        pytest.skip("this process is the interpreter's")
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("triton is not installed")
    if tuple(map(int, version.split(".")[:2])) < (3, 7):
        pytest.skip(f"triton {version} can't interpret loops over numbers known at run time only")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *(str(HERE / f"test_{name}.py") for name in names.split()),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout
