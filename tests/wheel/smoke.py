"""What an installed wheel is tried with: `python tests/wheel/smoke.py`, where the core's dependencies alone are there.

Policies are loaded, prompted by texts that they know, act as they were recorded to act, and are saved; data are read
from an npz file; the C++ module is there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import llmdpd
from llmdpd import Policy
from llmdpd.data import Trajectory, load_dataset

RECORDED = Path(__file__).parents[1] / "policy" / "recorded"


def acts_as_recorded(name: str, copy: Path) -> None:
    """A policy, and what it was saved as, give the recorded actions."""
    with np.load(RECORDED / "inputs.npz") as file:
        given = dict(file)
    parts = ("observations", "actions", "rewards")
    demonstration = Trajectory(*(given[f"demonstration_{part}"] for part in parts), "-")
    with np.load(RECORDED / name / "actions.npz") as file:
        wanted = file["actions"]
    for folder in (RECORDED / name, copy):
        policy = Policy.load(folder)
        reads = policy.network.reads
        policy.prompt(str(given["text"]) if reads.text else None, demonstration if reads.trajectory else None).seed(5)
        rewards = [None, *given["rewards"][1:]]
        found = [policy.act(now, reward=r) for now, r in zip(given["observations"], rewards, strict=True)]
        assert np.abs(np.stack(found) - wanted).max() < 1e-5, name
        policy.save(copy)


def reads_arrays(file: Path) -> None:
    """One episode of four steps."""
    ends = np.arange(4) == 3
    steps = {"observations": np.zeros((4, 3)), "actions": np.zeros((4, 2)), "rewards": np.zeros(4)}
    np.savez(file, **steps, terminals=np.zeros(4), timeouts=ends)
    assert load_dataset(file).num_episodes == 1


def main() -> None:
    info = llmdpd.build_info()
    print(llmdpd.__file__, llmdpd.__version__, info["backends"]["cpp"])
    assert info["backends"]["cpp"]["available"], info
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("llmdpd", "chunk", "mtdiff"):
            acts_as_recorded(name, Path(scratch) / name)
        reads_arrays(Path(scratch) / "flat.npz")
    print("a policy acts as it was recorded to")


if __name__ == "__main__":
    main()
