"""Texts that contradict their demonstration: how that is found, and that such a text, and no other, is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import llmdpd.policy.policy as policy_module
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.policy_network import States
from llmdpd.policy.contradiction import contradicts
from llmdpd.policy.folder import text_key
from llmdpd.prompts.useful_part import Recorded
from tests.policy.conftest import KNOWN, A, MakePolicy, S

DROP = BestOfN(samples=1, contradicted_text="drop")
OTHER = "Task: reach."


class Losses:
    """Stands in for a network: the loss of each prompt is a number, and what it is asked for is noted."""

    device = torch.device("cpu")

    def __init__(self, **of_prompt: float | None) -> None:
        self.of_prompt, self.asked = of_prompt, dict[str, list[Any]]()

    def diffusion_loss(self, states: Any, prompt: Any, actions: torch.Tensor, seeds: torch.Tensor) -> Any:
        self.asked.setdefault(prompt, []).append((states, actions, seeds))
        loss = self.of_prompt[prompt]
        return None if loss is None else torch.full((len(actions),), loss) + 0 * seeds


def shown(rng: np.random.Generator, *lengths: int) -> list[Recorded]:
    return [
        Recorded(rng.normal(size=(n, S)).astype(np.float32), rng.uniform(-1, 1, (n, A)).astype(np.float32))
        for n in lengths
    ]


@pytest.mark.parametrize(("given", "found"), [(0.3, True), (0.23, True), (0.1, False), (0.2, False), (0.21, False)])
def test_a_text_contradicts_that_makes_the_demonstration_less_likely(
    rng: np.random.Generator, given: float, found: bool
) -> None:
    network: Any = Losses(given=given, alone=0.2)
    one, two = shown(rng, 5, 3)
    assert contradicts(network, "given", "alone", [one, two]) is found  # type: ignore[arg-type]
    for (states, actions, seeds), (_, _, same) in zip(network.asked["given"], network.asked["alone"], strict=True):
        np.testing.assert_array_equal(states.observations, np.concatenate([one.observations, two.observations]))
        np.testing.assert_array_equal(actions, np.concatenate([one.actions, two.actions]))
        assert torch.equal(seeds, same), "both are compared at one noise"
    drawn = torch.cat([seeds for _, _, seeds in network.asked["given"]])
    assert len(drawn.unique()) == len(drawn), "no noise counts twice"


def test_without_such_a_loss_there_is_no_contradiction(rng: np.random.Generator) -> None:
    network: Any = Losses(given=None, alone=None)
    assert contradicts(network, "given", "alone", shown(rng, 4)) is False  # type: ignore[arg-type]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the policy asks; texts whose number is in `contradict` contradict, in the order in which it asks."""
    judge = SimpleNamespace(calls=[], contradict=set())

    def stand_in(network: Any, given: Any, alone: Any, demonstrations: Any) -> bool:
        judge.calls.append((given, alone, demonstrations))
        return len(judge.calls) - 1 in judge.contradict

    monkeypatch.setattr(policy_module, "contradicts", stand_in)
    return judge


def test_such_a_text_is_left_out_of_its_prompt_alone(
    make_policy: MakePolicy, example: Any, judged: SimpleNamespace
) -> None:
    policy = make_policy(acting=DROP, text_dropout=0.1)
    other = tuple(part + 0.1 for part in example)
    judged.contradict = {1}
    mixed = policy.encode_prompts([KNOWN, OTHER], [example, other])
    assert len(judged.calls) == 2
    kept = policy.with_acting(contradicted_text="keep")
    torch.testing.assert_close(mixed.pooled[:1], kept.encode_prompts([KNOWN], [example]).pooled)
    torch.testing.assert_close(mixed.pooled[1:], kept.encode_prompts([None], [other]).pooled)
    given, alone, demonstrations = judged.calls[1]
    torch.testing.assert_close(given.pooled, kept.encode_prompts([OTHER], [other]).pooled)
    torch.testing.assert_close(alone.pooled, kept.encode_prompts([None], [other]).pooled)
    assert [len(one.actions) for one in demonstrations] == [len(other[1])]


def test_nobody_asks_where_there_is_nothing_to_choose(
    make_policy: MakePolicy, example: Any, judged: SimpleNamespace
) -> None:
    make_policy(acting=BestOfN(samples=1), text_dropout=0.1).prompt(KNOWN, example)
    make_policy(acting=DROP).prompt(KNOWN, example)  # it never learned to do without a text
    both = make_policy(acting=DROP, text_dropout=0.1, trajectory_dropout=0.1)
    both.prompt(KNOWN)
    both.prompt(trajectory=example)
    assert not judged.calls


def test_a_policy_finds_the_text_under_which_it_learned_something_else(make_policy: MakePolicy, example: Any) -> None:
    """With real losses: under one text, and without, it learned what is shown, under another text the opposite."""
    policy = make_policy(critic=False, acting=DROP, network={"hidden_dim": 64}, text_dropout=0.1, text_hidden=64)
    observations, actions = (part.astype(np.float32) for part in example)
    network, states = policy.network.requires_grad_(True), torch.from_numpy(observations)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    index, steps = torch.zeros(20, dtype=torch.long), torch.arange(20)
    for iteration in range(400):
        optimiser.zero_grad()
        for text, share in ((KNOWN, 1.0), (None, 1.0), (OTHER, -1.0)):
            words = None if text is None else policy.texts[text_key(text)][None]
            prompt = network.encode(words, policy._tokens([example]))
            wanted, seeds = share * torch.from_numpy(actions), steps + 1000 * iteration
            loss = network.diffusion_loss(States(states, index, steps), prompt, wanted, seeds)
            assert loss is not None
            loss.mean().backward()
        optimiser.step()
    network.requires_grad_(False)

    def left_out(text: str) -> bool:
        kept = policy.with_acting(contradicted_text="keep").encode_prompts([text], [example])
        return not torch.equal(policy.encode_prompts([text], [example]).pooled, kept.pooled)

    assert left_out(OTHER)
    assert not left_out(KNOWN)
