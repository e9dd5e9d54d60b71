"""LaMo: both losses by hand, what trains and at which rate, that text is learned and tasks are, its checkpoints."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.methods.decision_transformer.method import cloning_loss
from llmdpd.methods.lamo.gpt2 import find_language_model
from llmdpd.methods.lamo.method import LaMo, LaMoConfig, Text, load_language
from llmdpd.methods.lamo.network import LanguageDecisionTransformer
from llmdpd.methods.networks import make_network
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.policy_network import PolicyConfig
from llmdpd.nn.sequence_model import GPT2Sizes, LoRAConfig, SequenceConfig
from llmdpd.policy.policy import Policy
from llmdpd.training.batches import moved
from llmdpd.utils.checkpoint import load_checkpoint, save_checkpoint

S, A, K, W = 4, 2, 5, 16
ACTING = ActingConfig(samples=1, noise_scale=0.0)
Folders = tuple[Path, Path]


def network(folder: Path, bound: float = 1.0, steps: int = K, dropout: float = 0.0) -> LanguageDecisionTransformer:
    config = PolicyConfig(
        action_bound=bound,
        context=ContextConfig(text=False, trajectory=False),
        sequence=SequenceConfig(context=steps, dropout=dropout, longest=40),
        language=find_language_model(str(folder)).sizes,
        lora=LoRAConfig(rank=3, alpha=7, dropout=dropout),
    )
    made = make_network("lamo", S, A, 0, config)
    assert isinstance(made, LanguageDecisionTransformer)
    made.fit(torch.randn(60, S) * 2 + 1)
    made.fit_returns(torch.tensor([1.0, -30.0, 7.0]))
    return made


def agent_of(tiny: Folders, dropout: float = 0.0, **changes: Any) -> LaMo:
    folder, corpus = tiny
    start = {"lr": 1e-2, "lm_lr": 1e-2, "lr_warmup": 0, "language_block": 9, "language_batch": 4}
    config = LaMoConfig(model=str(folder), corpus=str(corpus), **{**start, **changes})
    policy = network(folder, dropout=dropout)
    return LaMo(policy, config, 100, load_language(config, policy))


def batch_of(count: int = 6, steps: int = K) -> PromptedBatch:
    """Windows that end after 1 to all of their steps."""
    states, actions, returns = torch.randn(count, steps, S), torch.rand(count, steps, A), 20 * torch.randn(count, steps)
    mask = torch.arange(steps) < (torch.arange(count) % steps + 1)[:, None]
    return PromptedBatch(
        observations=states[:, 0],
        actions=actions[:, 0],
        rewards=torch.randn(count),
        next_observations=states[:, -1],
        terminals=torch.zeros(count),
        expert_actions=None,
        timesteps=torch.randint(0, 60, (count,)),
        text=None,
        tokens=None,
        windows=StepWindows(states, actions, None, mask, returns),
    )


def merged(policy: LanguageDecisionTransformer, folder: Path) -> Any:
    """transformers' own GPT-2 from its folder, the adapters' products added to its weights by hand."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    own = dict(policy.model.gpt2.named_parameters())
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            down, up = (own[f"h.{layer}.attn.c_attn.lora_{part}.default.weight"] for part in "AB")
            assert down.shape == (3, W)
            assert up.shape == (3 * W, 3)
            block.attn.c_attn.weight += 7.0 / 3 * (up @ down).T  # Conv1D: inputs first
    return model


def turn(policy: LanguageDecisionTransformer) -> None:
    """Adapters that do something: their product is 0 at first."""
    with torch.no_grad():
        for weight in policy.model.adapters():
            weight.copy_(0.3 * torch.randn_like(weight))


@torch.no_grad()
@pytest.mark.usefixtures("rng")
@pytest.mark.parametrize("adapted", [False, True])
def test_the_language_loss_is_that_of_the_language_model(tiny_gpt2: Folders, adapted: bool) -> None:
    agent = agent_of(tiny_gpt2)
    if adapted:
        turn(agent.policy)
    agent.policy.eval()
    blocks = torch.randint(0, 13, (4, 9))
    expected = merged(agent.policy, tiny_gpt2[0])(blocks, labels=blocks).loss
    torch.testing.assert_close(agent.language_loss(blocks), expected)


@torch.no_grad()
@pytest.mark.usefixtures("rng")
def test_the_cloning_loss_by_hand(tiny_gpt2: Folders) -> None:
    agent = agent_of(tiny_gpt2)
    policy, batch = agent.policy.eval(), batch_of()
    turn(policy)
    assert batch.windows is not None
    w = {name: value.double() for name, value in policy.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def mlp(name: str, x: Tensor) -> Tensor:
        hidden = linear(f"embed.{name}.first", x)
        return hidden + linear(f"embed.{name}.second", hidden * torch.erf(hidden / 2**0.5).add(1) / 2)

    features = policy.context.features(batch.windows.states).double()
    kinds = mlp("returns", batch.windows.returns.double()[..., None] / 30), mlp("states", features)
    tokens = torch.stack([*kinds, mlp("actions", batch.windows.actions.double())], 2)
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    tokens = tokens * w["embed.norm.weight"] + w["embed.norm.bias"]
    clock = (batch.timesteps[:, None] + torch.arange(K)).clamp(max=39)
    tokens = (tokens + w["embed.time.weight"][clock][:, :, None]).flatten(1, 2)
    language = merged(policy, tiny_gpt2[0]).double().transformer
    language.wpe.weight.zero_()  # time steps are embedded, not places
    hidden = language(inputs_embeds=tokens).last_hidden_state[:, 1::3]
    hidden = linear("head.0", hidden)
    found = linear("head.2", hidden * torch.erf(hidden / 2**0.5).add(1) / 2)
    errors = [
        float(((found[row, step] - batch.windows.actions[row, step]) ** 2).mean())
        for row in range(6)
        for step in range(row % K + 1)
    ]
    torch.testing.assert_close(float(cloning_loss(policy, batch)), float(np.mean(errors)), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("rng")
def test_a_step_goes_down_both_losses_together(tiny_gpt2: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of cloning + weight x language, and one norm bounds all of it."""
    agent, batch = agent_of(tiny_gpt2, language_weight=0.7, grad_clip=0.01), batch_of()
    turn(agent.policy)
    assert agent.text is not None
    blocks = agent.text.draw(4)
    monkeypatch.setattr(Text, "draw", lambda self, count: blocks[:count])
    learned = list(agent.policy.learned().parameters())
    total = cloning_loss(agent.policy.train(), batch) + 0.7 * agent.language_loss(blocks)
    gradient = torch.autograd.grad(total, learned)
    norm = torch.stack([part.square().sum() for part in gradient]).sum().sqrt()
    metrics = agent.learn(batch)
    torch.testing.assert_close(metrics["loss/cloning"] + 0.7 * metrics["loss/language"], total.detach())
    torch.testing.assert_close(metrics["grad/policy"], norm)
    for weight, expected in zip(learned, gradient, strict=True):
        torch.testing.assert_close(weight.grad, expected * 0.01 / norm, rtol=1e-3, atol=1e-6)


def weights_of(agent: LaMo) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in agent.policy.named_parameters()}


@pytest.mark.usefixtures("rng")
def test_only_embeddings_head_and_adapters_train(tiny_gpt2: Folders) -> None:
    from transformers import GPT2Model

    agent = agent_of(tiny_gpt2, dropout=0.1, weight_decay=0.1)
    before = weights_of(agent)
    for iteration in range(3):
        agent.update(batch_of(), iteration)
    changed = {name for name, weight in agent.policy.named_parameters() if not torch.equal(weight, before[name])}
    projections = {f"model.gpt2.h.{layer}.attn.c_attn" for layer in range(2)}
    adapters = {f"{name}.lora_{part}.default.weight" for name in projections for part in "AB"}
    assert changed == adapters | {name for name in before if name.startswith(("embed.", "head."))}
    assert {name for name, weight in agent.policy.named_parameters() if weight.requires_grad} == changed
    original = dict(GPT2Model.from_pretrained(tiny_gpt2[0]).named_parameters())
    for name, weight in agent.policy.model.gpt2.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, original[name.replace(".base_layer", "")]), name
    assert agent.text is not None
    assert torch.equal(agent.text.words.tokens, original["wte.weight"])
    assert torch.equal(agent.text.words.positions, original["wpe.weight"])
    for one, other in zip(agent.ema_policy.parameters(), agent.policy.parameters(), strict=True):
        assert torch.equal(one, other), "what acts is what was trained"


@pytest.mark.usefixtures("rng")
@pytest.mark.parametrize("still", ["lr", "lm_lr"])
def test_each_rate_is_its_own(tiny_gpt2: Folders, still: str) -> None:
    agent = agent_of(tiny_gpt2, **{still: 0.0, "lr_warmup": 4})
    turn(agent.policy)
    before = weights_of(agent)
    agent.update(batch_of(), 0)
    moved_ = {name for name, weight in agent.policy.named_parameters() if not torch.equal(weight, before[name])}
    assert moved_
    assert all((".lora_" in name) == (still == "lr") for name in moved_)
    rates = {name: float(each.param_groups[0]["lr"]) for name, each in agent.optimizers.items()}
    # A quarter of the way up the warm-up.
    expected = {"policy_optimizer": "lr", "adapters_optimizer": "lm_lr"}
    assert rates == {name: 0.0 if rate == still else pytest.approx(2.5e-3) for name, rate in expected.items()}


@pytest.mark.usefixtures("rng")
def test_it_learns_other_text(tiny_gpt2: Folders, tmp_path: Path) -> None:
    """By its adapters alone: the text's words are known, and come in another order."""
    other = tmp_path / "other.txt"
    other.write_text("again the goal stays to puck a door there\n" * 40)
    agent = agent_of((tiny_gpt2[0], other), lr=0.0, lm_lr=2e-2, language_weight=1.0, grad_clip=0.0)
    batch = batch_of()

    def loss() -> float:
        with torch.no_grad():
            assert agent.text is not None
            return float(agent.language_loss(agent.text.draw(50)))

    before = loss()
    for iteration in range(80):
        agent.update(batch, iteration)
    assert loss() < 0.7 * before


@pytest.mark.usefixtures("rng")
def test_without_a_weight_no_text_is_read(tiny_gpt2: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of((tiny_gpt2[0], Path("nowhere.txt")), language_weight=0.0)
    assert agent.text is None
    seen = []
    agent.policy.model.register_forward_hook(lambda *_: seen.append(1))
    assert agent.update(batch_of(), 0).keys() == {"loss/cloning", "grad/policy"}
    assert len(seen) == 1, "the windows, and nothing else"
    with pytest.raises(InputError, match=r"lamo\.language_weight"):
        LaMo(agent.policy, LaMoConfig(), 10, None)


@pytest.mark.usefixtures("rng")
def test_text_is_drawn_from_all_of_the_corpus_and_again_from_the_same_generator(tiny_gpt2: Folders) -> None:
    text = agent_of(tiny_gpt2).text
    assert text is not None
    short = dataclasses.replace(text, tokens=torch.arange(11, dtype=torch.int32))
    state = torch.get_rng_state()
    blocks = short.draw(100)
    assert blocks.shape == (100, 9)
    assert blocks.dtype == torch.int64
    assert torch.equal(blocks - blocks[:, :1], torch.arange(9).expand(100, -1))
    assert set(blocks[:, 0].tolist()) == {0, 1, 2}
    torch.set_rng_state(state)
    assert torch.equal(short.draw(100), blocks)
    assert torch.equal(dataclasses.replace(short, block=11).draw(1)[0], torch.arange(11))


@pytest.mark.usefixtures("rng")
def test_checkpoints_hold_what_is_learned_and_no_more(tiny_gpt2: Folders, tmp_path: Path) -> None:
    agent = agent_of(tiny_gpt2, ema_decay=0.9, ema_start=1)
    for iteration in range(3):
        agent.update(batch_of(), iteration)
    checkpoint = save_checkpoint(tmp_path, agent, 3, {})
    from safetensors.torch import load_file

    frozen = {tuple(weight.shape) for weight in agent.policy.model.frozen()}
    kept = load_file(checkpoint / "networks.safetensors")
    assert sum(name.startswith("policy/adapters") for name in kept) == 4
    assert (W, 4 * W) in frozen
    assert (W, 4 * W) not in {tuple(weight.shape) for weight in kept.values()}
    other = agent_of(tiny_gpt2, ema_decay=0.9, ema_start=1)
    load_checkpoint(checkpoint, other)
    for mine, theirs in ((agent.policy, other.policy), (agent.ema_policy, other.ema_policy)):
        for (name, one), two in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(one, two), name
    for ema, own in zip(agent.ema_policy.model.frozen(), agent.policy.model.frozen(), strict=True):
        assert ema is own, "one copy of the language model in memory"
    changed = [
        not torch.equal(e, p) for e, p in zip(agent.ema_policy.parameters(), agent.policy.parameters(), strict=True)
    ]
    assert any(changed), "the EMA is another network"


@pytest.mark.usefixtures("rng")
def test_a_policy_needs_no_language_model_to_act(tiny_gpt2: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2[0], tmp_path / "gpt2")
    agent = agent_of((folder, tiny_gpt2[1]))
    agent.update(batch_of(), 0)
    facts = {"target_returns": {"reach-v3": 3.0}}
    policy = Policy(agent.ema_policy, None, ACTING, facts=facts)
    policy.save(tmp_path / "policy")
    shutil.rmtree(folder)
    again = Policy.load(tmp_path / "policy")
    states = torch.randn(7, S).numpy()
    assert np.array_equal(again.prompt().act(states), policy.prompt().act(states))
    with torch.no_grad():  # far out, where a regression without a bound would be
        again.network.head[2].bias.fill_(5.0)
    assert np.array_equal(again.prompt().act(states), np.ones((7, A), np.float32))


@torch.no_grad()
@pytest.mark.parametrize("place", range(3 * K))
@pytest.mark.usefixtures("rng")
def test_an_action_hangs_on_what_lies_before_it(tiny_gpt2: Folders, place: int) -> None:
    model = network(tiny_gpt2[0]).eval()
    batch = batch_of(2)
    assert batch.windows is not None
    returns, states, actions = batch.windows.returns, batch.windows.states, batch.windows.actions
    clock = torch.arange(K).expand(2, -1)
    before = model(returns, states, actions, clock)
    step, kind = divmod(place, 3)
    (returns, states, actions)[kind][:, step] += 3.0
    changed = (model(returns, states, actions, clock) - before).abs().amax((0, 2)) != 0
    assert changed.tolist() == [later > step or (later == step and kind < 2) for later in range(K)]


@pytest.mark.slow
def test_asked_for_much_it_does_better_than_its_data(world: Any, tiny_gpt2: Folders, rng: np.random.Generator) -> None:
    behaviour, steps = world.episodes(lambda state, _: world.behave(state), 400)
    states, actions, rewards = (np.stack([step[n] for step in steps], 1).astype(np.float32) for n in range(3))
    to_go = np.cumsum(rewards[:, ::-1], 1)[:, ::-1].copy()
    model = network(tiny_gpt2[0], steps=world.STEPS)
    model.fit(torch.from_numpy(states.reshape(-1, S)))
    model.fit_returns(torch.from_numpy(to_go.reshape(-1)))
    config = LaMoConfig(model=str(tiny_gpt2[0]), corpus=str(tiny_gpt2[1]), lr=5e-3, lm_lr=5e-3, lr_warmup=30)
    agent = LaMo(model, config, 250, load_language(config, model))
    mask = torch.ones(64, world.STEPS, dtype=torch.bool)
    for iteration in range(250):
        rows = rng.integers(0, len(states), 64)
        windows = StepWindows(
            *map(torch.from_numpy, (states[rows], actions[rows])), None, mask, torch.from_numpy(to_go[rows])
        )
        batch = dataclasses.replace(batch_of(64), timesteps=torch.zeros(64).long(), windows=windows)
        metrics = agent.update(batch, iteration)

    policy = Policy(agent.ema_policy, None, ACTING).prompt(target_return=float(np.quantile(to_go[:, 0], 0.9)))

    learned, _ = world.episodes(world.told(policy), 300)
    best, _ = world.episodes(lambda state, _: world.right(state), 300)
    print("behaviour, learned, best, language loss:", behaviour, learned, best, float(metrics["loss/language"]))
    assert learned > behaviour + 0.2 * (best - behaviour)
    assert float(metrics["loss/language"]) < 1.0, "and it still speaks: of 13 words any would be worth 2.6"


@pytest.mark.usefixtures("rng")
def test_the_losses_read_nothing_back_from_the_device(tiny_gpt2: Folders) -> None:
    """On `meta`, a device whose values can't be had; so that a CUDA graph can hold them."""
    agent = agent_of(tiny_gpt2, dropout=0.1)
    assert agent.text is not None
    agent.policy.train().to("meta")
    words = dataclasses.replace(
        agent.text.words, tokens=agent.text.words.tokens.to("meta"), positions=agent.text.words.positions.to("meta")
    )
    agent.text = Text(words, agent.text.tokens.to("meta"), agent.text.block)
    loss = cloning_loss(agent.policy, moved(batch_of(), torch.device("meta")))
    (loss + agent.language_loss(agent.text.draw(3))).backward()
    assert all(weight.grad is not None for weight in agent.policy.learned().parameters())


@pytest.mark.usefixtures("rng")
def test_what_does_not_fit_is_named(tiny_gpt2: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the puck goes\n")
    with pytest.raises(InputError, match="shorter than a block") as error:
        agent_of((tiny_gpt2[0], short))
    assert (error.value.field, error.value.found) == ("lamo.corpus", "3 tokens")
    with pytest.raises(InputError, match="fewer positions") as error:
        agent_of(tiny_gpt2, language_block=25)
    assert error.value.field == "lamo.language_block"
    policy = network(tiny_gpt2[0])
    tensors = {name: weight for name, weight in merged(policy, tiny_gpt2[0]).transformer.named_parameters()}
    with pytest.raises(InputError, match="do not fit") as error:
        policy.model.load_blocks(tensors, tmp_path)
    assert error.value.field == "wpe.weight"
    context = ContextConfig(text=False, trajectory=False)
    wrong = PolicyConfig(context=context, language=GPT2Sizes(1, 1, 8, 8, activation="telepathy"))
    with pytest.raises(InputError, match="no such activation") as error:
        LanguageDecisionTransformer(S, A, 0, wrong)
    assert error.value.field == "policy.language.activation"
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(InputError, match=r"llmdpd\[lamo\]"):
        network(tiny_gpt2[0])


def test_published_settings_are_the_defaults() -> None:
    config, lora = LaMoConfig(), LoRAConfig()
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.1)
    assert (config.lr, config.weight_decay, config.lr_warmup, config.grad_clip) == (1e-4, 1e-5, 2500, 0.25)
    assert (config.language_weight, config.ema_decay) == (0.1, 0)
