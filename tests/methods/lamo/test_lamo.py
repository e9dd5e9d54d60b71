"""LaMo: both losses by hand, what trains and at which rate, that text is learned, its checkpoints and refusals."""

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
from llmdpd.methods.decision_transformer import cloning_loss
from llmdpd.methods.lamo.backbone import LanguageSizes, LoRAConfig
from llmdpd.methods.lamo.method import LaMo, LaMoConfig, Text
from llmdpd.methods.lamo.network import LanguageDecisionTransformer
from llmdpd.nn.acting import ActingConfig
from llmdpd.policy.policy import Policy
from llmdpd.utils.checkpoint import load_checkpoint, save_checkpoint

S, A, K, W = 4, 2, 5, 16
Folders = tuple[Path, Path]


@pytest.fixture
def make_lamo(make_method: Any) -> Any:
    """The method with a rate at which it learns at once."""
    start = {"lr": 1e-2, "lm_lr": 1e-2, "lr_warmup": 0}
    return lambda **changes: make_method("lamo", **{**start, **changes})


@pytest.fixture
def batch(make_batch: Any) -> Any:
    """Windows that end after 1 to all of their steps."""
    return make_batch(6, H=K)


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


def perturb(policy: LanguageDecisionTransformer) -> None:
    """Give the adapters weights with an effect: their product is 0 at first."""
    with torch.no_grad():
        for weight in policy.model.adapters():
            weight.copy_(0.3 * torch.randn_like(weight))


def weights_of(method: LaMo) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in method.policy.named_parameters()}


def changed_in(method: LaMo, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in method.policy.named_parameters() if not torch.equal(weight, before[name])}


@torch.no_grad()
@pytest.mark.parametrize("adapted", [False, True])
def test_the_language_loss_is_that_of_the_language_model(make_lamo: Any, tiny_gpt2: Folders, adapted: bool) -> None:
    method = make_lamo()
    if adapted:
        perturb(method.policy)
    method.policy.eval()
    blocks = torch.randint(0, 13, (4, 9))
    expected = merged(method.policy, tiny_gpt2[0])(blocks, labels=blocks).loss
    torch.testing.assert_close(method.language_loss(blocks), expected)


@torch.no_grad()
def test_the_cloning_loss_by_hand(make_lamo: Any, batch: Any, tiny_gpt2: Folders) -> None:
    policy = make_lamo().policy.eval()
    perturb(policy)
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


def test_a_step_goes_down_both_losses_together(make_lamo: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of cloning + weight x language, and one norm bounds all of it."""
    method = make_lamo(language_weight=0.7, grad_clip=0.01)
    perturb(method.policy)
    blocks = method.text.draw(4)
    monkeypatch.setattr(Text, "draw", lambda self, count: blocks[:count])
    learned = list(method.policy.learned().parameters())
    total = cloning_loss(method.policy.train(), batch) + 0.7 * method.language_loss(blocks)
    gradient = torch.autograd.grad(total, learned)
    norm = torch.stack([part.square().sum() for part in gradient]).sum().sqrt()
    metrics = method.learn(batch)
    torch.testing.assert_close(metrics["loss/cloning"] + 0.7 * metrics["loss/language"], total.detach())
    torch.testing.assert_close(metrics["grad/policy"], norm)
    means = {p: state["exp_avg"] for each in method.optimizers.values() for p, state in each.state.items()}
    for weight, expected in zip(learned, gradient, strict=True):
        # After the first step the mean is a tenth of the gradient that it was made of.
        torch.testing.assert_close(10 * means[weight], expected * 0.01 / norm, rtol=1e-3, atol=1e-6)


def test_only_embeddings_head_and_adapters_train(make_lamo: Any, batch: Any, tiny_gpt2: Folders) -> None:
    from transformers import GPT2Model

    method = make_lamo(weight_decay=0.1, **{"network.sequence.dropout": 0.1, "network.lora.dropout": 0.1})
    before = weights_of(method)
    for iteration in range(3):
        method.update(batch, iteration)
    projections = {f"model.gpt2.h.{layer}.attn.c_attn" for layer in range(2)}
    adapters = {f"{name}.lora_{part}.default.weight" for name in projections for part in "AB"}
    changed = changed_in(method, before)
    assert changed == adapters | {name for name in before if name.startswith(("embed.", "head."))}
    assert {name for name, weight in method.policy.named_parameters() if weight.requires_grad} == changed
    original = dict(GPT2Model.from_pretrained(tiny_gpt2[0]).named_parameters())
    for name, weight in method.policy.model.gpt2.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, original[name.replace(".base_layer", "")]), name
    assert torch.equal(method.text.words.tokens, original["wte.weight"])
    assert torch.equal(method.text.words.positions, original["wpe.weight"])


@pytest.mark.parametrize("still", ["lr", "lm_lr"])
def test_each_rate_is_its_own(make_lamo: Any, batch: Any, still: str) -> None:
    method = make_lamo(**{still: 0.0, "lr_warmup": 4})
    perturb(method.policy)
    before = weights_of(method)
    method.update(batch, 0)
    changed = changed_in(method, before)
    assert changed
    assert all((".lora_" in name) == (still == "lr") for name in changed)
    rates = {name: float(each.param_groups[0]["lr"]) for name, each in method.optimizers.items()}
    # A quarter of the way up the warm-up.
    expected = {"policy_optimizer": "lr", "adapters_optimizer": "lm_lr"}
    assert rates == {name: 0.0 if rate == still else pytest.approx(2.5e-3) for name, rate in expected.items()}


def test_it_learns_other_text(make_lamo: Any, batch: Any, tmp_path: Path) -> None:
    """By its adapters alone: the text has the words that are known, in another order."""
    other = tmp_path / "other.txt"
    other.write_text("again the goal stays to puck a door there\n" * 40)
    method = make_lamo(corpus=str(other), lr=0.0, lm_lr=2e-2, language_weight=1.0, grad_clip=0.0)
    blocks = method.text.draw(50)
    losses = []
    for iteration in range(81):
        with torch.no_grad():
            losses.append(float(method.language_loss(blocks)))
        method.update(batch, iteration)
    assert losses[80] < 0.7 * losses[0]


def test_without_a_weight_no_text_is_read(make_lamo: Any, batch: Any) -> None:
    method = make_lamo(corpus="nowhere.txt", language_weight=0.0)
    assert method.text is None
    passes: list[int] = []
    method.policy.model.register_forward_hook(lambda *_: passes.append(1))
    assert method.update(batch, 0).keys() == {"loss/cloning", "grad/policy"}
    assert len(passes) == 1, "the windows, and nothing else"


def test_text_is_sampled_from_all_of_the_corpus_and_again_from_the_same_generator(make_lamo: Any) -> None:
    short = dataclasses.replace(make_lamo().text, tokens=torch.arange(11, dtype=torch.int32))
    state = torch.get_rng_state()
    blocks = short.draw(100)
    assert blocks.shape == (100, 9)
    assert blocks.dtype == torch.int64
    assert torch.equal(blocks - blocks[:, :1], torch.arange(9).expand(100, -1))
    assert set(blocks[:, 0].tolist()) == {0, 1, 2}
    torch.set_rng_state(state)
    assert torch.equal(short.draw(100), blocks)
    assert torch.equal(dataclasses.replace(short, block=11).draw(1)[0], torch.arange(11))


def test_checkpoints_hold_what_is_learned_and_no_more(make_lamo: Any, batch: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    method, other = (make_lamo(ema_decay=0.9, ema_start=1) for _ in range(2))
    for iteration in range(3):
        method.update(batch, iteration)
    checkpoint = save_checkpoint(tmp_path, method, 3, {})
    frozen = {tuple(weight.shape) for weight in method.policy.model.frozen()}
    kept = load_file(checkpoint / "networks.safetensors")
    assert sum(name.startswith("policy/adapters") for name in kept) == 4
    assert (W, 4 * W) in frozen
    assert (W, 4 * W) not in {tuple(weight.shape) for weight in kept.values()}
    load_checkpoint(checkpoint, other)
    for mine, theirs in ((method.policy, other.policy), (method.ema_policy, other.ema_policy)):
        for (name, one), two in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(one, two), name
    for ema, own in zip(method.ema_policy.model.frozen(), method.policy.model.frozen(), strict=True):
        assert ema is own, "one copy of the language model in memory"
    pairs = zip(method.ema_policy.parameters(), method.policy.parameters(), strict=True)
    assert not all(torch.equal(ema, own) for ema, own in pairs), "the EMA is another network"


def test_a_policy_needs_no_language_model_to_act(
    make_lamo: Any, batch: Any, tiny_gpt2: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_gpt2[0], tmp_path / "gpt2")
    method = make_lamo(model=str(folder))
    method.update(batch, 0)
    policy = Policy("lamo", method.acting_network, None, ActingConfig(), metadata={"target_returns": {"reach-v3": 3.0}})
    policy.save(tmp_path / "policy")
    shutil.rmtree(folder)
    again = Policy.load(tmp_path / "policy")
    states = torch.randn(7, S).numpy()
    assert np.array_equal(again.prompt().act(states), policy.prompt().act(states))
    with torch.no_grad():  # far out, where a regression without a bound would be
        again.network.head[2].bias.fill_(5.0)
    assert np.array_equal(again.prompt().act(states), np.ones((7, A), np.float32))


def test_inputs_that_do_not_fit_are_named(
    make_lamo: Any,
    make_config: Any,
    make_network: Any,
    tiny_gpt2: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the puck goes\n")
    policy = make_network("lamo")
    tensors = dict(merged(policy, tiny_gpt2[0]).transformer.named_parameters())
    sizes = {"network.language": LanguageSizes(1, 1, 8, 8, activation="telepathy")}
    for wrong, field, found in (
        (lambda: make_lamo(corpus=str(short)), "method.corpus", "3 tokens"),
        (lambda: make_lamo(language_block=25), "method.language_block", 25),
        (lambda: policy.model.load_blocks(tensors, tmp_path), "wpe.weight", [24, 16]),
        (lambda: make_network("lamo", **sizes), "network.language.activation", "telepathy"),
        (lambda: make_config("lamo", **sizes).require(), "method.model", make_config("lamo").network.language),
    ):
        with pytest.raises(InputError) as error:
            wrong()  # type: ignore[no-untyped-call]
        assert (error.value.field, error.value.found) == (field, found)
    make_config("lamo").require()
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else find(name))
    for needs in (lambda: make_network("lamo"), lambda: make_config("lamo").require()):
        with pytest.raises(InputError, match=r"llmdpd\[lamo\]"):
            needs()


def test_published_settings_are_the_defaults() -> None:
    config, lora = LaMoConfig(), LoRAConfig()
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.1)
    assert (config.lr, config.weight_decay, config.lr_warmup, config.grad_clip) == (1e-4, 1e-5, 2500, 0.25)
    assert (config.language_weight, config.ema_decay) == (0.1, 0)
