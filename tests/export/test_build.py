"""The exported folder builds by its own CMakeLists.txt, and needs nothing but the standard library."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from exporting import Library, make_policy, prompt_of

from llmdpd.export.cpp import export_cpp
from llmdpd.policy.policy import Policy

pytestmark = pytest.mark.slow

MOST_BYTES = 8_000_000
STANDARD = {"libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "ld-linux-x86-64.so", "ld-linux-aarch64.so"}
"""What C++ programs are linked to: libm and the loader are libc's, libgcc_s is libstdc++'s."""


@pytest.fixture(scope="module", params=["g++", "clang++"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Path, Path]:
    """A policy of the default's sizes, prompted, its export and what was built of it."""
    if not (shutil.which(request.param) and shutil.which("cmake")):
        pytest.skip(f"needs {request.param} and cmake")
    rng = np.random.default_rng(3)
    policy = make_policy(network={"hidden_dim": 256})
    prompt = prompt_of(rng, policy)
    folder, out = tmp_path_factory.mktemp("export") / "out", tmp_path_factory.mktemp("build")
    export_cpp(policy, {"push": prompt}, folder)
    for words in (["-S", folder, "-B", out, f"-DCMAKE_CXX_COMPILER={request.param}"], ["--build", out]):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
    return policy.prompt(*prompt), folder, out


def test_it_acts_as_the_policy_does(build: tuple[Policy, Path, Path]) -> None:
    policy, folder, out = build
    library = Library(out / "libllmdpd_policy.so")
    acting = library.policy(folder / "policy.llmdpd", folder / "prompts" / "push.llmdpd")
    for row in np.random.default_rng().normal(0, 0.3, (6, 7)).astype(np.float32):
        expected = policy.act(row)
        assert np.linalg.norm(acting.act(row) - expected) <= 2e-5 * np.linalg.norm(expected)
    size = (out / "libllmdpd_policy.so").stat().st_size + (folder / "policy.llmdpd").stat().st_size
    assert size <= MOST_BYTES


def test_nothing_but_the_standard_library_is_linked(build: tuple[Policy, Path, Path]) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    for name in ("libllmdpd_policy.so", "example"):
        section = subprocess.run(["readelf", "-d", build[2] / name], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.*\.so)", section))
        assert "libstdc++.so" in needed
        assert needed <= STANDARD | ({"libllmdpd_policy.so"} if name == "example" else set())


def test_the_example_drives_a_loop(build: tuple[Policy, Path, Path]) -> None:
    _, folder, out = build
    words = [out / "example", folder / "policy.llmdpd", folder / "prompts" / "push.llmdpd"]
    said = subprocess.run([*words, "0.05"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("25 steps at 500 Hz on ")
    failed = subprocess.run([*words[:2], words[1]], capture_output=True, text=True, check=False, timeout=60)
    assert failed.returncode == 1
    assert "this is no prompt's file" in failed.stderr


def configured(source: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    call = ["cmake", "-S", source, "-B", out, *words]
    return subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)


def test_kernels_are_built_for_what_the_compiler_makes_code_for(rng: np.random.Generator, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    policy = make_policy()
    export_cpp(policy, {"push": prompt_of(rng, policy)}, tmp_path / "out")
    flags = {}
    for compiler in ("g++", "aarch64-linux-gnu-g++"):
        if shutil.which(compiler) is not None:
            done = configured(tmp_path / "out", tmp_path / compiler, f"-DCMAKE_CXX_COMPILER={compiler}")
            assert done.returncode == 0, done.stderr
            makes = (tmp_path / compiler).rglob("flags.make")
            flags[compiler] = any("-mavx" in file.read_text() for file in makes)
    native = platform.machine() == "x86_64"
    assert flags == {name: native and name == "g++" for name in flags}
    done = configured(tmp_path / "out", tmp_path / "other", "-DCMAKE_SYSTEM_NAME=Generic")
    assert done.returncode != 0
    assert "for Linux" in done.stderr


def test_another_machines_compiler_builds_it(tmp_path: Path) -> None:
    """The portable kernels, run under emulation."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    rng = np.random.default_rng()
    policy = make_policy()
    prompt = prompt_of(rng, policy)
    export_cpp(policy, {"push": prompt}, tmp_path / "out")
    words = [compiler, "-std=c++17", "-O2", "-Wno-psabi", "-o", tmp_path / "example"]
    sources = [tmp_path / "out" / name for name in ("example.cpp", "llmdpd_policy.cpp")]
    subprocess.run([*words, *sources], check=True, timeout=900)
    if shutil.which(emulator) is None:
        pytest.skip(f"needs {emulator}")
    call = [emulator, "-L", "/usr/aarch64-linux-gnu", tmp_path / "example", tmp_path / "out" / "policy.llmdpd"]
    prompted = tmp_path / "out" / "prompts" / "push.llmdpd"
    said = subprocess.run([*call, prompted, "0.01"], capture_output=True, text=True, check=True, timeout=300).stdout
    policy.prompt(*prompt)
    policy.act(np.full(7, 0.1, np.float32))  # the example's first, before its loop
    policy.reset()
    last = [policy.act(np.full(7, 0.1, np.float32)) for _ in range(5)][-1]
    found = np.array(said.split("last action")[1].split(), np.float32)
    np.testing.assert_allclose(found, last, atol=1e-4)
