"""Policy folders that version 0.1 wrote, with the actions that it took by them: they load, and act the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.policy.folder import text_key
from llmdpd.policy.policy import Policy

RECORDED = Path(__file__).parent / "recorded"
POLICIES = ("llmdpd", "chunk", "dt", "mtdiff")


def at_first(network: dict[str, Any]) -> dict[str, Any]:
    """A network's configuration with the names that its fields had when format 2 was new."""
    names = {"geometric_similarity": "likeness", "timestep_embedding": "clock"}
    names |= {name: "plan" for name, value in network.items() if name == "trajectory" and isinstance(value, dict)}
    return {names.get(k, k): at_first(v) if isinstance(v, dict) else v for k, v in network.items()}


def actions(policy: Policy) -> np.ndarray:
    """The actions [12, 3, 4] of twelve steps in three episodes, under the recorded prompts."""
    with np.load(RECORDED / "inputs.npz") as file:
        given = dict(file)
    demonstration = Trajectory(
        *(given[f"demonstration_{part}"] for part in ("observations", "actions", "rewards")), "-"
    )
    text, reads = str(given["text"]), policy.network.reads
    assert text_key(text) in policy.texts or not reads.text
    policy.prompt(text if reads.text else None, demonstration if reads.trajectory else None).seed(5)
    rewards = [None, *given["rewards"][1:]]
    return np.stack([policy.act(now, reward=r) for now, r in zip(given["observations"], rewards, strict=True)])


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_version_0_1_acts_as_it_did(name: str, tmp_path: Path) -> None:
    folder = RECORDED / name
    assert json.loads((folder / "policy.json").read_text())["format"] == 1
    policy = Policy.load(folder)
    assert (policy.critic is not None) == (name == "llmdpd")
    assert policy.action_horizon == (2 if name == "chunk" else 1)
    found = actions(policy)
    with np.load(folder / "actions.npz") as file:
        # Not bit for bit: kernels, and torch's products, sum in the order of the CPU's widest vectors.
        np.testing.assert_allclose(found, file["actions"], rtol=0, atol=1e-5)
    policy.save(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["format"] == 3
    np.testing.assert_array_equal(actions(Policy.load(tmp_path / "policy")), found)
    description = json.loads((tmp_path / "policy" / "policy.json").read_text())
    # As format 2 was: no layout, no bounds of actions.
    description["format"], description["network"] = 2, at_first(description["network"])
    description["spaces"] = {name: size for name, size in description["spaces"].items() if name.endswith("_dim")}
    (tmp_path / "policy" / "policy.json").write_text(json.dumps(description))
    np.testing.assert_array_equal(actions(Policy.load(tmp_path / "policy")), found)


@pytest.mark.parametrize("field", ["acting.noise_scal", "policy.hiden_dim"])
def test_a_misspelled_field_of_a_policy_of_version_0_1_is_named(field: str, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(RECORDED / "llmdpd", folder)
    description = json.loads((folder / "policy.json").read_text())
    part, name = field.split(".")
    description[part][name] = 1
    (folder / "policy.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="unknown field") as error:
        Policy.load(folder)
    assert error.value.field == field
    assert "policy.json" in str(error.value.path)
