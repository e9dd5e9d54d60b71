"""`Policy`: prompts in, actions out, to disk and back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.acting import ActingConfig
from llmdpd.context import ContextConfig
from llmdpd.critic import DoubleQ
from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.policy import Policy
from llmdpd.policy_folder import text_key
from llmdpd.policy_network import ConditionalPolicy, PolicyConfig
from llmdpd.prompts import TextPrompt
from llmdpd.prompts.models import LLMIdentity
from llmdpd.prompts.trajectory import TrajectoryEncoderConfig

S, A, D = 7, 3, 10
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8)
CONTEXT = ContextConfig(text_dim=5, text_hidden=16, trajectory_dim=4, encoder=ENCODER)
KNOWN = "Task: push the puck."
SINGLE = ActingConfig(samples=1)

MakePolicy = Callable[..., Policy]


@pytest.fixture
def make_policy(rng: np.random.Generator) -> MakePolicy:
    def make(critic: bool = True, acting: ActingConfig = SINGLE, **context: Any) -> Policy:
        config = PolicyConfig(hidden_dim=24, time_dim=8, context=dataclasses.replace(CONTEXT, **context))
        network = ConditionalPolicy(S, A, D, config)
        network.context.features.fit(torch.randn(50, S) * 2 + 1)
        q = DoubleQ(network.context.state_dim, A, network.context.prompt_dim, 16) if critic else None
        texts = {text_key(text): torch.randn(D) for text in (KNOWN, "Task: reach.")}
        return Policy(network, q, acting, texts=texts, facts={"trained_on": ["push"], "seed": 3})

    return make


@pytest.fixture
def example(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(20, S)), rng.uniform(-1, 1, (20, A))


@pytest.fixture
def policy(make_policy: MakePolicy, example: Any) -> Policy:
    return make_policy().prompt(text=KNOWN, trajectory=example)


def test_shapes(policy: Policy, rng: np.random.Generator) -> None:
    one = policy.act(rng.normal(size=S))
    many = policy.act(rng.normal(size=(6, S)).tolist())
    assert (one.shape, many.shape) == ((A,), (6, A))
    assert one.dtype == many.dtype == np.float32
    assert np.abs(many).max() <= 1
    assert policy.act(np.zeros((0, S))).shape == (0, A)


@pytest.mark.parametrize("bad", [[[1.0], [1.0, 2.0]], "push", {"a": 1}, [object()]])
def test_an_observation_that_is_no_numbers(policy: Policy, bad: Any) -> None:
    with pytest.raises(InputError, match="no array of numbers") as error:
        policy.act(bad)
    assert error.value.field == "observation"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
def test_an_observation_that_is_not_finite(policy: Policy, value: Any) -> None:
    row = [1.0] * (S - 1) + [value]
    for bad in (row, [[1.0] * S, row]):
        with pytest.raises(InputError, match="NaN or Inf"):
            policy.act(bad)


def test_views_of_every_kind(policy: Policy, rng: np.random.Generator) -> None:
    rows = rng.normal(size=(4, 2 * S))
    frozen = rows[:, :S].astype(np.float32)
    frozen.flags.writeable = False
    for view in (
        rows[::-1, :S],
        rows[:, ::-2],
        rows[:1, :S][::-1],
        rows[0, S - 1 :: -1],
        rows[:, :S].T.copy().T,
        frozen,
    ):
        policy.seed(1)
        action = policy.act(view)
        policy.seed(1)
        np.testing.assert_array_equal(action, policy.act(np.ascontiguousarray(view, np.float32).copy()))


@pytest.mark.parametrize("shape", [(S + 1,), (4, S - 1), (2, 3, S), ()])
def test_wrong_observations(policy: Policy, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="wrong observation") as error:
        policy.act(np.ones(shape))
    assert error.value.found == shape
    assert str(S) in str(error.value.expected)


def test_no_prompt_yet(make_policy: MakePolicy) -> None:
    with pytest.raises(InputError, match="no prompt yet"):
        make_policy().act(np.ones(S))


@pytest.mark.parametrize("which", ["text", "trajectory"])
def test_a_prompt_that_is_needed(make_policy: MakePolicy, example: Any, which: str) -> None:
    given = {"text": KNOWN, "trajectory": example}
    del given[which]
    with pytest.raises(InputError, match=f"{which} prompt") as error:
        make_policy().prompt(**given)
    assert error.value.field == which
    off = make_policy(**{which: False})
    assert off.prompt(**given).act(np.ones(S)).shape == (A,)
    dropout = make_policy(prompt_dropout=0.2)
    assert dropout.prompt(**given).act(np.ones(S)).shape == (A,)


@pytest.mark.parametrize("which", ["text", "trajectory"])
def test_a_prompt_that_it_was_not_trained_with(make_policy: MakePolicy, example: Any, which: str) -> None:
    with pytest.raises(InputError, match=f"without {which} prompts") as error:
        make_policy(**{which: False}).prompt(KNOWN, example)
    assert error.value.field == which


def test_each_prompt_changes_the_action(make_policy: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy, state = make_policy(), rng.normal(size=S)
    other = (example[0] + 1.0, example[1])

    def action(text: str, trajectory: Any) -> np.ndarray:
        policy.seed(5)
        return policy.prompt(text, trajectory).act(state)

    base = action(KNOWN, example)
    np.testing.assert_array_equal(action(KNOWN, example), base)
    assert not np.array_equal(action("Task: reach.", example), base)
    assert not np.array_equal(action(KNOWN, other), base)


def test_text_prompt_objects_and_trajectory_objects(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy()
    observations, actions = (part.astype(np.float32) for part in example)
    trajectory = Trajectory(observations, actions, np.zeros(20, np.float32), "push")
    state = np.ones(S)
    first = policy.prompt(KNOWN, example).act(state)
    policy.seed(0)
    second = policy.prompt(TextPrompt(task="push the puck."), trajectory).act(state)
    assert TextPrompt(task="push the puck.").render() == KNOWN
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("s", "a"), [(S + 1, A), (S, A - 1)])
def test_a_trajectory_of_another_width(make_policy: MakePolicy, s: int, a: int) -> None:
    with pytest.raises(InputError, match="another width") as error:
        make_policy().prompt(KNOWN, (np.ones((5, s)), np.ones((5, a))))
    assert error.value.field == "trajectory"
    assert str(s) in str(error.value.found)
    assert str(a) in str(error.value.found)


@pytest.mark.parametrize("bad", [(1.0, 2.0), ([[1.0], [1.0, 2.0]], [[1.0]]), ("a", "b")])
def test_a_trajectory_that_is_no_numbers(make_policy: MakePolicy, bad: Any) -> None:
    with pytest.raises(InputError) as error:
        make_policy().prompt(KNOWN, bad)
    assert error.value.field == "trajectory"


def test_a_trajectory_that_is_too_long_or_empty_or_nan(make_policy: MakePolicy, example: Any) -> None:
    every = make_policy(encoder=dataclasses.replace(ENCODER, sampling="all"))
    with pytest.raises(InputError, match="limit") as error:
        every.prompt(KNOWN, example)
    assert "20" in str(error.value.found)
    assert "8" in str(error.value.expected)
    every.prompt(KNOWN, (example[0][:8], example[1][:8]))
    with pytest.raises(InputError, match="empty"):
        make_policy().prompt(KNOWN, (example[0][:0], example[1][:0]))
    with pytest.raises(InputError, match="NaN"):
        make_policy().prompt(KNOWN, (example[0] * np.nan, example[1]))
    with pytest.raises(InputError, match="do not fit"):
        make_policy().prompt(KNOWN, (example[0], example[1][1:]))


def test_a_prompt_that_is_refused_leaves_the_old_one(policy: Policy, example: Any) -> None:
    policy.seed(1)
    before = policy.act(np.ones(S))
    with pytest.raises(InputError):
        policy.prompt(KNOWN, (example[0][:, 1:], example[1]))
    policy.seed(1)
    np.testing.assert_array_equal(policy.act(np.ones(S)), before)


def test_some_prompts_and_not_others(make_policy: MakePolicy, example: Any) -> None:
    """Never left out in silence, also where the policy could do without."""
    policy = make_policy(prompt_dropout=0.5)
    with pytest.raises(InputError, match="all or for none") as error:
        policy.encode_prompts([KNOWN, None], [example, example])
    assert error.value.field == "text"
    with pytest.raises(InputError, match="all or for none"):
        policy.encode_prompts([KNOWN, KNOWN], [None, example])


# The clock


def test_the_clock_counts_and_is_reset(policy: Policy, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    condition = type(policy.network.context).condition

    def spy(self: Any, state: Any, prompts: Any, index: Any, clock: torch.Tensor) -> Any:
        seen.append(clock.tolist())
        return condition(self, state, prompts, index, clock)

    monkeypatch.setattr(type(policy.network.context), "condition", spy)
    for _ in range(2):
        policy.act(np.ones(S))
    policy.act(np.ones((2, S)))
    policy.act(np.ones(S), step=40)
    policy.act(np.ones(S))
    policy.reset()
    policy.act(np.ones(S))
    policy.act(np.ones(S), step=0)
    policy.prompt(KNOWN, example).act(np.ones(S))
    assert seen == [[0], [1], [2, 2], [40], [41], [0], [0], [0]]


# Seeds


def test_seeds_are_reproducible(make_policy: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy, states = make_policy().prompt(KNOWN, example), rng.normal(size=(5, S))
    policy.seed(7)
    first = [policy.act(state) for state in states]
    torch.manual_seed(1)  # has no say in it
    policy.seed(7)
    for state, action in zip(states, first, strict=True):
        np.testing.assert_array_equal(policy.act(state), action)
    policy.seed(8)
    assert not np.array_equal(policy.act(states[0]), first[0])


def test_noise_is_new_at_each_act_and_in_each_row(policy: Policy) -> None:
    rows = policy.act(np.ones((4, S)))
    assert len({row.tobytes() for row in rows}) == 4
    assert not np.array_equal(policy.act(np.ones((4, S))), rows)


@pytest.mark.parametrize("samples", [1, 6])
def test_many_episodes_at_once_equal_each_alone(
    make_policy: MakePolicy, rng: np.random.Generator, samples: int
) -> None:
    policy = make_policy(acting=ActingConfig(samples=samples))
    examples = [(rng.normal(size=(n, S)), rng.normal(size=(n, A))) for n in (3, 30)]
    prompts = policy.encode_prompts([KNOWN, "Task: reach."], examples)
    states = rng.normal(size=(9, S)).astype(np.float32)
    index, seeds = rng.integers(0, 2, 9), rng.integers(0, 2**62, 9)
    steps = rng.integers(0, 50, 9)
    whole = policy.act_many(states, prompts, index, steps, seeds)
    for row in range(9):
        alone = policy.encode_prompts([[KNOWN, "Task: reach."][index[row]]], [examples[index[row]]])
        one = slice(row, row + 1)
        action = policy.act_many(states[one], alone, None, steps[one], seeds[one])
        np.testing.assert_allclose(action[0], whole[row], atol=1e-4)


# On disk


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


KNOWN_TEXT = """
import sys
import numpy as np
from llmdpd import Policy
policy = Policy.load(sys.argv[1]).prompt(text=sys.argv[2], trajectory=(np.ones((4, 7)), np.ones((4, 3))))
policy.act(np.ones(7))
heavy = ["transformers", "gymnasium", "metaworld", "minari", "h5py", "huggingface_hub"]
print(*[name for name in heavy if name in sys.modules])
"""


def test_a_known_text_needs_no_llm(make_policy: MakePolicy, tmp_path: Path) -> None:
    """Deployment: the policy folder alone, neither the LLM nor an environment is imported."""
    make_policy().save(tmp_path / "p")
    done = subprocess.run(
        [sys.executable, "-c", KNOWN_TEXT, str(tmp_path / "p"), KNOWN], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_a_new_text_goes_to_the_llm_once(
    make_policy: MakePolicy, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("llmdpd.prompts.llm.LLMEncoder", fake_encoder(asked))
    policy = make_policy()
    policy.prompt("Task: something new.", example)
    policy.prompt("Task: something new.", example)
    assert asked == [("minilm", torch.device("cpu"), None, ["Task: something new."])]


def fake_encoder(asked: list[tuple[Any, ...]], width: int = D) -> type:
    class Encoder:
        def __init__(self, model: str, device: torch.device, dtype: str | None) -> None:
            self.called = (model, device, dtype)
            self.identity = LLMIdentity("m", "r2", dtype or "float32")

        def encode(self, texts: list[str]) -> torch.Tensor:
            asked.append((*self.called, list(texts)))
            return torch.ones(len(texts), width)

    return Encoder


def test_a_new_text_is_embedded_as_in_training(
    make_policy: MakePolicy,
    example: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("llmdpd.prompts.llm.LLMEncoder", fake_encoder(asked))
    policy = make_policy()
    for number, (revision, told) in enumerate((("r2", False), ("r1", True))):
        policy.facts["llm"] = {"model": "m", "revision": revision, "dtype": "bfloat16"}
        policy.save(tmp_path / "p")
        caplog.clear()
        Policy.load(tmp_path / "p").prompt(f"Task: new {number}.", example)
        assert asked[-1][2] == "bfloat16"
        assert ("another one than in training" in caplog.text) == told


def test_a_text_model_of_another_width(make_policy: MakePolicy, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmdpd.prompts.llm.LLMEncoder", fake_encoder([], D + 1))
    policy = make_policy()
    for _ in range(2):
        with pytest.raises(InputError, match="another width") as error:
            policy.prompt("Task: something new.", example)
        assert str(D) in str(error.value.expected)
        assert str(D + 1) in str(error.value.found)


def test_another_way_of_acting(policy: Policy, example: Any) -> None:
    other = policy.with_acting(samples=9, selection="max")
    assert (other.acting.samples, other.acting.selection) == (9, "max")
    assert policy.acting.samples == 1
    assert other.network is policy.network
    assert other.prompt(KNOWN, example).act(np.ones(S)).shape == (A,)
    with pytest.raises(InputError, match="selection"):
        policy.with_acting(selection="best")


def test_a_policy_shows_what_it_is_in_a_line(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy()
    assert "no prompt yet" in repr(policy)
    assert f"{policy.network.state_dim} state" in repr(policy)
    assert "prompted" in repr(policy.prompt(text=KNOWN, trajectory=example))
