from __future__ import annotations

import subprocess
import sys

from llmdpd import tasks


def test_seed_ranges_are_disjoint_and_ordered() -> None:
    assert 0 < tasks.COLLECTION_SEED_END <= tasks.EVALUATION_SEED_START < tasks.SELECTION_SEED_START


def test_the_package_imports_nothing_heavy() -> None:
    protocols = "llmdpd.tasks.protocols"
    code = (
        "import sys, llmdpd.tasks, llmdpd.tasks.simulation.worker; "
        "import llmdpd.tasks.simulation.rollout, llmdpd.tasks.simulation.render; "
        f"import {protocols}; list({protocols}.PROTOCOLS); "
        "print(sorted({'torch', 'metaworld', 'gymnasium', 'mujoco'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
