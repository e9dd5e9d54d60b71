from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import llmdpd
from llmdpd import kernels
from llmdpd.ops import native
from llmdpd.ops.build_info import build_info

# Stands in the way of the compiled module, or of the kernels, as if they had never been installed.
WITHOUT = """
import importlib.abc, json, sys

class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("llmdpd._native", "llmdpd.kernels"):
            raise ImportError(f"No module named {name!r}")

sys.meta_path.insert(0, Gone())
from llmdpd import build_info
print(json.dumps(build_info()))
"""


def test_build_info() -> None:
    info = build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == llmdpd.__version__
    cpp = info["cpp"]
    assert cpp["compiled"]
    assert cpp["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert "-O" in cpp["flags"]
    assert cpp["in_use"] == cpp["runnable"][-1]
    assert cpp["instruction_sets"][0] == "plain"
    assert set(cpp["runnable"]) <= set(cpp["instruction_sets"])
    assert info["threads"] >= 1
    backends = info["backends"]
    assert backends["reference"] == backends["cpp"] == {"available": True, "reason": None}
    available, why = kernels.availability()
    assert backends["triton"] == {"available": available, "reason": why}


def test_the_instruction_set_in_use_is_told() -> None:
    native.module().set_isa("plain")
    try:
        assert build_info()["cpp"]["in_use"] == "plain"
    finally:
        native.module().set_isa("")


def test_without_the_compiled_parts() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["cpp"] == {"compiled": False}
    assert info["backends"]["reference"]["available"]
    for name, missing in (("cpp", "llmdpd._native"), ("triton", "llmdpd.kernels")):
        assert not info["backends"][name]["available"]
        assert missing in info["backends"][name]["reason"]
        assert "pip install ." in info["backends"][name]["reason"]


def test_a_compiled_module_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.module(), "__version__", "0.0.1")
    native._load.cache_clear()
    try:
        available, reason = native.available()
        assert not available
        assert reason is not None
        assert "is of version 0.0.1" in reason
        with pytest.raises(RuntimeError, match=r"is of version 0\.0\.1"):
            native.module()
    finally:
        native._load.cache_clear()


def test_command() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "llmdpd.ops.build_info"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == llmdpd.__version__
