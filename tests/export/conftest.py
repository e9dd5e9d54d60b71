"""The exported library, compiled once, and a policy in it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from llmdpd.export.cpp import export_cpp
from llmdpd.policy.policy import Policy
from llmdpd.utils.system import lock_folder

sys.path.append(str(Path(__file__).parent / "library"))

from exporting import Library, built, make_policy, prompt_of


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found


@pytest.fixture(scope="session")
def library(compiler: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The source compiled by itself, for this machine's instruction set; `.ci/sanitize` adds flags of its own.

    The first of parallel workers compiles it for all.
    """
    flags = os.environ.get("LLMDPD_EXPORT_FLAGS", "").split()
    own = tmp_path_factory.getbasetemp()
    whole = (own.parent if hasattr(request.config, "workerinput") else own) / "library" / "whole"
    whole.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(whole.parent)
    try:
        if not whole.exists():
            folder = tmp_path_factory.mktemp("compiled")
            built(compiler, folder, "-O1", "-march=native", *flags)
            folder.rename(whole)
    finally:
        if lock is not None:
            os.close(lock)
    return Library(whole / "library.so")


@pytest.fixture
def exported(rng: np.random.Generator, tmp_path: Path) -> tuple[Policy, Path]:
    """A default policy with its prompt, and the folder of its export."""
    policy = make_policy()
    prompt = prompt_of(rng, policy)
    export_cpp(policy, {"push": prompt}, tmp_path / "out")
    return policy.prompt(*prompt), tmp_path / "out"
