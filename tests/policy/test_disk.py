"""`Policy.save` and `load`: to disk and back, and every field that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig
from llmdpd.nn.critic import DoubleQ
from llmdpd.policy.policy import Policy

S, A = 7, 3
KNOWN = "Task: push the puck."
MakePolicy = Callable[..., Policy]


@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("switches", [{}, {"text": False}, {"trajectory": False}])
def test_saved_and_loaded_acts_bit_for_bit(
    make_policy: MakePolicy,
    example: Any,
    tmp_path: Path,
    rng: np.random.Generator,
    critic: bool,
    switches: dict[str, bool],
) -> None:
    acting = ActingConfig(samples=5 if critic else 1, temperature=0.5, noise_scale=0.8)
    policy = make_policy(critic, acting, **switches)
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert (loaded.critic is not None) == critic
    assert loaded.acting == acting
    assert loaded.network.config == policy.network.config
    assert loaded.facts == policy.facts
    assert loaded.llm == "minilm"
    states = rng.normal(size=(40, S))
    for one in (policy, loaded):
        one.prompt(
            KNOWN if switches.get("text", True) else None, example if switches.get("trajectory", True) else None
        ).seed(4)
    for _ in range(3):
        np.testing.assert_array_equal(loaded.act(states), policy.act(states))
    assert not any(p.requires_grad for p in loaded.network.parameters())
    assert not loaded.network.training


def test_critics_without_prompts_come_back(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    policy.critic = DoubleQ(S, A, 0, 16)
    policy.save(tmp_path / "p")
    loaded = Policy.load(tmp_path / "p").critic
    assert loaded is not None
    assert loaded.prompt_dim == 0
    assert torch.equal(loaded.q2[0].weight, policy.critic.q2[0].weight)


def test_saving_replaces(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy(True).save(tmp_path / "p")
    second = make_policy(False)
    second.save(tmp_path / "p")
    assert Policy.load(tmp_path / "p").critic is None
    assert not (tmp_path / "p" / "critic.safetensors").exists()


def test_a_run_folder_is_loaded_too(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy().save(tmp_path / "run" / "policy")
    assert Policy.load(tmp_path / "run").facts["seed"] == 3


@pytest.mark.parametrize(
    ("part", "name", "value", "field"),
    [
        ("sizes", "state_dim", "7", "sizes.state_dim"),
        ("sizes", "more", 1, "sizes.more"),
        ("sizes", "critic_hidden", None, "sizes.critic_hidden"),
        ("policy", "hidden_dmi", 24, "policy.hidden_dmi"),
        ("policy", "schedule", "straight", "policy.schedule"),
        ("acting", "samples", 1.5, "acting.samples"),
        ("acting", "smaples", 1, "acting.smaples"),
        ("acting", "temperature", 0, "acting.temperature"),
        ("acting", "samples", 0, "acting.samples"),
        ("acting", "noise_scale", -1, "acting.noise_scale"),
        ("acting", "steps", 3, "acting.steps"),
        ("sizes", "state_dim", -1, "sizes.state_dim"),
        ("sizes", "action_dim", 0, "sizes.action_dim"),
        ("sizes", "embedding_dim", 10**12, "sizes.embedding_dim"),
        ("sizes", "critic_hidden", -3, "sizes.critic_hidden"),
        ("policy", "diffusion_steps", 0, "policy.diffusion_steps"),
        ("policy", "time_dim", 3, "policy.time_dim"),
        ("policy", "hidden_dim", 10**9, "policy.hidden_dim"),
        ("policy", "context", {"encoder": {"heads": 3}}, "policy.context.encoder.heads"),
        ("policy", "context", {"encoder": {"steps": 0}}, "policy.context.encoder.steps"),
        ("policy", "context", {"features": "metaworld"}, "features"),
        ("facts", "llm", "minilm", "facts.llm."),
        ("facts", "llm", {"model": "minilm", "revision": "1"}, "facts.llm.dtype"),
    ],
)
def test_wrong_fields_are_named(
    make_policy: MakePolicy, tmp_path: Path, part: str, name: str, value: Any, field: str
) -> None:
    make_policy().save(tmp_path / "p")
    file = tmp_path / "p" / "policy.json"
    description = json.loads(file.read_text())
    description[part][name] = value
    file.write_text(json.dumps(description))
    with pytest.raises(InputError) as error:
        Policy.load(tmp_path / "p")
    assert error.value.field == field
    assert error.value.path == str(file)


def test_a_missing_size_is_named(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy().save(tmp_path / "p")
    file = tmp_path / "p" / "policy.json"
    description = json.loads(file.read_text())
    del description["sizes"]["action_dim"]
    file.write_text(json.dumps(description))
    with pytest.raises(InputError, match="missing") as error:
        Policy.load(tmp_path / "p")
    assert error.value.field == "sizes.action_dim"
    assert error.value.path == str(file)


def test_sizes_that_the_tensors_do_not_have(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy().save(tmp_path / "p")
    file = tmp_path / "p" / "policy.json"
    description = json.loads(file.read_text())
    description["policy"]["hidden_dim"] = 25
    file.write_text(json.dumps(description))
    with pytest.raises(InputError, match="does not fit") as error:
        Policy.load(tmp_path / "p")
    assert error.value.path == str(tmp_path / "p" / "model.safetensors")


def test_a_gpu_that_is_absent(make_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_policy().save(tmp_path / "p")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="absent") as error:
        Policy.load(tmp_path / "p", device="cuda")
    assert error.value.field == "device"
