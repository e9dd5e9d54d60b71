"""`Policy.save` and `load`: to disk and back, and every field that can be wrong."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.critic import DoubleQ
from llmdpd.policy.policy import Policy

S, A = 7, 3
RECORDED = Path(__file__).parent / "recorded"
POLICIES = ("llmdpd", "chunk", "dt", "mtdiff")
KNOWN = "Task: push the puck."
MakePolicy = Callable[..., Policy]


def test_saved_and_loaded_acts_bit_for_bit(
    make_policy: MakePolicy, example: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    states = rng.normal(size=(40, S))
    for number, (critic, chunk, prompts) in enumerate(
        [(True, 1, {}), (False, 1, {"text": False}), (True, 1, {"trajectory": False}), (False, 3, {})]
    ):
        acting = BestOfN(samples=5 if critic else 1, temperature=0.5, noise_scale=0.8, action_horizon=min(chunk, 2))
        policy = make_policy(critic, acting, {"chunk": chunk}, **prompts)
        policy.save(tmp_path / str(number))
        loaded = Policy.load(tmp_path / str(number))
        assert (loaded.method, loaded.llm, loaded.acting, loaded.metadata) == (
            "llmdpd",
            "minilm",
            acting,
            policy.metadata,
        )
        assert (loaded.critic is not None) == critic
        assert loaded.network.config == policy.network.config
        for one in (policy, loaded):
            one.prompt(
                KNOWN if prompts.get("text", True) else None, example if prompts.get("trajectory", True) else None
            )
            one.seed(4)
        for _ in range(3):
            np.testing.assert_array_equal(loaded.act(states), policy.act(states))
        assert not any(p.requires_grad for p in loaded.network.parameters())
        assert not loaded.network.training


def test_critics_without_prompts_come_back(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    policy.critic = DoubleQ(S, A, 0, 16)
    policy.save(tmp_path / "p")
    loaded = Policy.load(tmp_path / "p").critic
    assert isinstance(loaded, DoubleQ)
    assert loaded.prompt_dim == 0
    assert torch.equal(loaded.q2[0].weight, policy.critic.q2[0].weight)


def test_saving_replaces(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy(True).save(tmp_path / "p")
    make_policy(False).save(tmp_path / "p")
    assert Policy.load(tmp_path / "p").critic is None
    assert not (tmp_path / "p" / "critic.safetensors").exists()


def test_a_folder_of_other_files_is_kept(make_policy: MakePolicy, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_policy().save(run / "policy")
    (run / "results.json").write_text("{}")
    (run / "policy" / "notes.txt").write_text("precious")
    for folder, found in ((run, "policy, results.json"), (run / "policy", "notes.txt")):
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        with pytest.raises(InputError, match="other files") as error:
            make_policy().save(folder)
        assert (error.value.path, error.value.found) == (str(folder), found)
        assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    (tmp_path / "empty").mkdir()
    make_policy().save(tmp_path / "empty")
    Policy.load(tmp_path / "empty")


def test_a_run_folder_is_loaded_too(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy().save(tmp_path / "run" / "policy")
    assert Policy.load(tmp_path / "run").metadata["seed"] == 3


DELETED = object()


@pytest.mark.parametrize(
    ("place", "value", "field"),
    [
        ("spaces.state_dim", "7", "spaces.state_dim"),
        ("spaces.state_dim", -1, "spaces.state_dim"),
        ("spaces.action_dim", 0, "spaces.action_dim"),
        ("spaces.action_dim", DELETED, "spaces.action_dim"),
        ("spaces.embedding_dim", 10**12, "spaces.embedding_dim"),
        ("spaces.more", 1, "spaces.more"),
        ("critic.hidden", None, "critic.hidden"),
        ("critic.hidden", -3, "critic.hidden"),
        ("critic.sees_prompts", 2, "critic.sees_prompts"),
        ("network.hidden_dmi", 24, "network.hidden_dmi"),
        ("network.hidden_dim", 10**9, "network.hidden_dim"),
        ("network.schedule", "straight", "network.schedule"),
        ("network.diffusion_steps", 0, "network.diffusion_steps"),
        ("network.time_dim", 3, "network.time_dim"),
        ("network.chunk", 0, "network.chunk"),
        ("network.chunk", 2.5, "network.chunk"),
        ("network.chunk", 1001, "network.chunk"),
        ("network.chunk", 2, "network.chunk"),  # with critics
        ("network.context", {"encoder": {"heads": 3}}, "network.context.encoder.heads"),
        ("network.context", {"encoder": {"steps": 0}}, "network.context.encoder.steps"),
        ("network.context", {"features": "metaworld"}, "features"),
        ("acting.samples", 1.5, "acting.samples"),
        ("acting.samples", 0, "acting.samples"),
        ("acting.smaples", 1, "acting.smaples"),
        ("acting.temperature", 0, "acting.temperature"),
        ("acting.noise_scale", -1, "acting.noise_scale"),
        ("acting.steps", 3, "acting.steps"),
        ("acting.action_horizon", 5, "acting.action_horizon"),
        ("acting.action_horizon", 0, "acting.action_horizon"),
        ("metadata.llm", "minilm", "metadata.llm."),
        ("metadata.llm", {"model": "minilm", "revision": "1"}, "metadata.llm.dtype"),
        ("method", "llmdpt", "method"),
    ],
)
def test_wrong_fields_are_named(make_policy: MakePolicy, tmp_path: Path, place: str, value: Any, field: str) -> None:
    change_description(make_policy(), tmp_path / "p", place, value)
    with pytest.raises(InputError) as error:
        Policy.load(tmp_path / "p")
    assert error.value.field == field
    assert error.value.path == str(tmp_path / "p" / "policy.json")


@pytest.mark.parametrize(("name", "value"), [("hidden_dim", 25), ("chunk", 3)])
def test_sizes_that_the_tensors_do_not_have(make_policy: MakePolicy, tmp_path: Path, name: str, value: int) -> None:
    change_description(make_policy(False), tmp_path / "p", f"network.{name}", value)
    with pytest.raises(InputError, match="does not fit") as error:
        Policy.load(tmp_path / "p")
    assert error.value.path == str(tmp_path / "p" / "model.safetensors")


def change_description(policy: Policy, folder: Path, place: str, value: Any) -> None:
    """Save a policy with a dotted field of policy.json changed, or deleted."""
    policy.save(folder)
    file = folder / "policy.json"
    description = json.loads(file.read_text())
    *parts, name = place.split(".")
    section = description[parts[0]] if parts else description
    section[name] = value
    if value is DELETED:
        del section[name]
    file.write_text(json.dumps(description))


def test_a_gpu_that_is_absent(make_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_policy().save(tmp_path / "p")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="absent") as error:
        Policy.load(tmp_path / "p", device="cuda")
    assert error.value.field == "device"


@pytest.mark.parametrize("where", ["network", "critic", "texts"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    make_policy: MakePolicy, tmp_path: Path, where: str, value: float
) -> None:
    """Where a policy is made, and where it is loaded."""
    policy = make_policy()
    part = {"network": policy.network.state_dict(), "critic": policy.critic.state_dict(), "texts": policy.texts}[where]
    tensor = next(t for t in part.values() if t.is_floating_point())
    tensor.view(-1)[-1] = value
    with pytest.raises(InputError, match="NaN or Inf"):
        policy.with_acting(samples=2)
    policy.save(tmp_path / "p")
    with pytest.raises(InputError, match="NaN or Inf") as error:
        Policy.load(tmp_path / "p")
    assert ".safetensors" in str(error.value.path)


def test_it_can_be_loaded_while_it_is_saved(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    policy.save(tmp_path / "p")
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(lambda: [policy.save(tmp_path / "p") for _ in range(60)])
        while not saving.done():
            Policy.load(tmp_path / "p")
        saving.result()


@pytest.mark.parametrize("name", POLICIES)
def test_no_value_of_the_description_ends_in_another_error(name: str, tmp_path: Path) -> None:
    """Each value, one after the other, is exchanged for one that JSON may hold: a policy, or an `InputError`."""
    folder = tmp_path / "p"
    Policy.load(RECORDED / name).save(folder)
    file = folder / "policy.json"
    whole = file.read_text()
    refused = 0
    for place in places(json.loads(whole)):
        for value in (None, True, [], {}, "", "\ud800", -1, 10**30, 10**400, 1e308):
            description = json.loads(whole)
            *outer, last = place
            holder = description
            for key in outer:
                holder = holder[key]
            holder[last] = value
            file.write_text(json.dumps(description))
            try:
                Policy.load(folder)
            except InputError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{place} = {value!r:.20}: {error!r:.200}") from error
    assert refused > 100


def places(value: Any, outer: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in entries:
        yield (*outer, key)
        yield from places(part, (*outer, key))


@pytest.mark.parametrize("there", [True, False])
def test_critics_that_the_description_and_the_files_disagree_on(
    make_policy: MakePolicy, tmp_path: Path, there: bool
) -> None:
    file = tmp_path / "p" / "policy.json"
    make_policy().save(tmp_path / "p")
    description = json.loads(file.read_text())
    if there:
        description["critic"] = None
    else:
        del description["sha256"]["critic.safetensors"]
    file.write_text(json.dumps(description))
    with pytest.raises(InputError, match="disagree") as error:
        Policy.load(tmp_path / "p")
    assert (error.value.path, error.value.field) == (str(file), "critic")


def test_declared_sizes_take_no_memory(make_policy: MakePolicy, tmp_path: Path) -> None:
    """A description of 128 layers, 8,192 wide, beside the tensors of a small policy: 34 GB if it were built."""
    policy = make_policy()
    policy.save(tmp_path / "p")
    file = tmp_path / "p" / "policy.json"
    description = json.loads(file.read_text())
    encoder = description["network"]["context"]["encoder"]
    encoder.update(layers=128, width=8192, inner=8192, heads=8)
    file.write_text(json.dumps(description))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="does not fit"):
        Policy.load(tmp_path / "p")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB
