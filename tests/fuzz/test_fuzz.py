"""Some cases of every fuzzer, fresh ones each run: each ends in a result or in one clear error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent
_CASES = 60


def run_fuzzer(*words: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(FUZZ), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=1800, env=environment)


def test_damaged_files_command_lines_and_native_calls(fresh_seed: int) -> None:
    done = run_fuzzer("--cases", _CASES, "--seed", fresh_seed)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| native: act | 60 |" in done.stdout


def test_what_is_no_clear_error_is_a_fault() -> None:
    """The judge itself: every way in which a case can fail is seen, and the cases after it are run."""
    code = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import judge
judge.SECONDS = 0.5
def case(rng):
    case.number += 1
    if case.number == 1: raise KeyError("unclear")
    if case.number == 2: raise ValueError("clear")
    if case.number == 3: os.kill(os.getpid(), 11)
def hangs(rng): time.sleep(60)
def memory(rng): case.kept = bytearray(os.urandom(1 << 20)) * 2500
case.number = 0
found = judge.run_cases("x", judge.Target(lambda folder: case, (ValueError,)), [0, 1, 2])
assert found.counts == {"unclear": 1, "refused": 1, "died": 1}, found
assert found.faults == {"unclear: KeyError at outside": 0, "died: SIGSEGV": 2}, found
found = judge.run_cases("x", judge.Target(lambda folder: hangs, ()), [7, 8])
assert found.counts == {"hangs": 2}, found
judge.SECONDS = 60
found = judge.run_cases("x", judge.Target(lambda folder: memory, ()), [7, 8])
assert found.counts == {"memory": 2}, found
"""
    subprocess.run([sys.executable, "-c", code, str(FUZZ)], check=True, timeout=300)


def test_damage_of_one_case_is_not_in_the_next() -> None:
    code = """
import copy, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import mutations
kept, rng = copy.deepcopy(mutations._VALUES), np.random.default_rng()
for _ in range(2000):
    value = {"a": [1, {"b": 2}]}
    for _ in range(6):
        value = mutations.change_value(value, rng)
assert repr(mutations._VALUES) == repr(kept)
"""
    subprocess.run([sys.executable, "-c", code, str(FUZZ)], check=True, timeout=300)


def test_damage_inside_a_container_passes_the_containers_own_checks() -> None:
    code = """
import io, sys, zipfile
import h5py
import numpy as np
sys.path.insert(0, sys.argv[1])
import containers, mutations
rng = np.random.default_rng()
file, archive = io.BytesIO(), io.BytesIO()
with h5py.File(file, "w", libver="latest") as made:
    made.create_group("group", track_order=True).attrs.update({str(n): "x" * (50 + n) for n in range(7)})
    made["numbers"] = np.ones(3)
np.savez(archive, numbers=np.ones(3))
sound = file.getvalue()
sums = [(end, containers.lookup3(sound[start:end])) for start, end in containers._checked_blocks(sound)]
assert len(sums) > 4 and all(int.from_bytes(sound[end : end + 4], "little") == checksum for end, checksum in sums)
changed = 0
for _ in range(50):
    damaged = containers.damaged_inside(archive.getvalue(), rng, mutations._blind)
    with zipfile.ZipFile(io.BytesIO(damaged)) as found:
        assert found.testzip() is None
    damaged = containers.damaged_inside(sound, rng, mutations._blind)
    changed += damaged != sound
    for start, end in containers._checked_blocks(sound):
        assert int.from_bytes(damaged[end : end + 4], "little") == containers.lookup3(damaged[start:end])
assert changed > 30
"""
    subprocess.run([sys.executable, "-c", code, str(FUZZ)], check=True, timeout=300)
