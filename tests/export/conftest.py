"""The exported library, compiled once, and a policy in it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.export.cpp import export_cpp
from llmdpd.policy.policy import Policy

sys.path.append(str(Path(__file__).parent / "library"))

from exporting import Library, built, make_policy, prompt_of


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found


@pytest.fixture(scope="session")
def library(compiler: str, made_once: Callable[..., Path]) -> Library:
    """The source compiled by itself, for this machine's instruction set; `.ci/sanitize` adds flags of its own."""
    flags = os.environ.get("LLMDPD_EXPORT_FLAGS", "").split()
    folder = made_once("library", lambda folder: built(compiler, folder, "-O1", "-march=native", *flags))
    return Library(folder / "library.so")


@pytest.fixture
def exported(rng: np.random.Generator, tmp_path: Path) -> tuple[Policy, Path]:
    """A default policy with its prompt, and the folder of its export."""
    policy = make_policy()
    prompt = prompt_of(rng, policy)
    export_cpp(policy, {"push": prompt}, tmp_path / "out")
    return policy.prompt(*prompt), tmp_path / "out"
