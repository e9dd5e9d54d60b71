"""Run configurations of version 0.1, as it wrote them, are read; what they can't be any more is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmdpd.config.stored import read_stored
from llmdpd.errors import InputError

STORED = Path(__file__).parent / "stored"
SHARED = {
    "data.demonstrations": "recorded/prompts",
    "data.demonstration_episodes": 3,
    "data.post_success_steps": 20,
    "evaluation.videos": False,
    "evaluation.video_tasks": 8,
    "tasks.unseen": ("door-lock-v3",),
    "training.iterations": 40,
    "method.batch_size": 16,
    "method.prompts_per_batch": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "llmdpd": {
        "method.eta": 0.05,
        "method.critic_hidden": 16,
        "method.clone": "expert",
        "method.precision": "bf16",
        "method.augmentation.rotate": 0.5,
        "method.network.hidden_dim": 16,
        "method.network.context.kind": "retrieval",
        "method.network.context.encoder.width": 16,
        "method.network.context.retrieval.lookahead": (0, 2),
        "method.acting.samples": 2,
        "method.acting.noise_scale": 0.7,
        "method.acting.precision": "fp32",
        "method.acting.action_horizon": None,
    },
    "td3-bc": {
        "method.critic_hidden": 16,
        "method.alpha": 2.5,
        "method.network.hidden_dim": 16,
        "method.network.context.text": False,
        "method.augmentation.rotate": 0.0,
    },
    "dt": {"method.lr": 0.01, "method.grad_clip": 0.25, "method.network.sequence.width": 16},
    "mtdiff": {
        "method.lr": 0.01,
        "method.return_probability": 0.8,
        "method.network.diffusion_steps": 200,
        "method.network.demonstration.sampling": "window",
        "method.network.trajectory.horizon": 4,
        "method.acting.steps": 2,
    },
}


def read(name: str, **changes: Any) -> Any:
    plain = json.loads((STORED / f"{name}.json").read_text())
    for field, value in changes.items():
        *parts, last = field.split("__")
        place = plain
        for part in parts:
            place = place[part]
        place[last] = value
    return read_stored(plain, Path("run/config.json"))


@pytest.mark.parametrize("name", OWN)
def test_a_configuration_of_version_0_1_is_read(name: str) -> None:
    config = read(name)
    assert config.method.name == name
    for field, expected in {**SHARED, **OWN[name]}.items():
        found = config
        for part in field.split("."):
            found = getattr(found, part)
        assert found == expected, field
    config.check_values()


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"acting__views": 8}, "acting.views", "no longer possible"),
        ({"training__augmentation__example_noise": 0.1}, "training.augmentation.example_noise", "no longer possible"),
        ({"method": "llmdpt"}, "method", "unknown method"),
        ({"agent__eta": "much"}, "method.eta", "wrong value"),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read("llmdpd", **changes)
    assert (error.value.path, str(error.value.field).startswith(field)) == ("run/config.json", True)


def test_fields_that_had_another_name() -> None:
    stored = {
        "name": "llmdpd",
        "network": {"context": {"retrieval": {"likeness": False, "clock": False, "width": 64}}},
    }
    retrieval = read_stored({"method": stored}, Path("f")).method.network.context_config().retrieval
    assert (retrieval.geometric_similarity, retrieval.timestep_embedding, retrieval.width) == (False, False, 64)
    for name in ("mtdiff", "trajectory-diffusion"):
        method: Any = read_stored({"method": {"name": name, "network": {"plan": {"horizon": 5}}}}, Path("f")).method
        assert method.network.trajectory.horizon == 5
    method = read_stored({"method": {"name": "cql", "draws": 3}}, Path("f")).method
    assert method.samples == 3
    with pytest.raises(InputError, match="unknown field") as error:
        read_stored({"method": {"name": "cql", "draws": 3, "samples": 3}}, Path("f"))
    assert error.value.field == "method.draws"


def test_a_configuration_of_this_version_with_unknown_fields() -> None:
    with pytest.raises(InputError, match="unknown field") as error:
        read_stored({"method": {"name": "bc", "eta": 1.0}}, Path("f"), "config.")
    assert error.value.field == "config.method.eta"
    assert read_stored({"method": {"name": "bc"}}, Path("f")).method.name == "bc"
