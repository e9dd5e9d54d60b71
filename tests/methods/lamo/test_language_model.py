"""Finding a language model for LaMo and reading its sizes and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.methods.lamo.backbone import LanguageSizes
from llmdpd.methods.lamo.language_model import find_language_model, load_language_model


@pytest.fixture
def folder(tiny_gpt2: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(tiny_gpt2[0], tmp_path / "gpt2")


def change(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    given = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in given.items() if value != "left out"}))


def test_sizes_are_those_of_its_configuration(folder: Path) -> None:
    model = find_language_model(str(folder))
    assert model.sizes == LanguageSizes(2, 2, 16, 64, "gelu_new", 1e-5)
    assert model.positions == 24
    assert model.source.revision.startswith("sha256:")
    change(folder, n_inner=40, activation_function="relu", layer_norm_epsilon=1e-4, n_positions=20)
    other = find_language_model(str(folder))
    assert (other.sizes, other.positions) == (LanguageSizes(2, 2, 16, 40, "relu", 1e-4), 20)
    assert other.source.revision != model.source.revision


def test_defaults_are_gpt2s_own() -> None:
    from transformers import GPT2Config

    own, sizes = GPT2Config(), LanguageSizes()
    assert (own.n_layer, own.n_head, own.n_embd, 4 * own.n_embd) == (12, 12, 768, 3072)
    assert (sizes.layers, sizes.heads, sizes.width, sizes.inner) == (12, 12, 768, 3072)
    assert (own.activation_function, own.layer_norm_epsilon) == (sizes.activation, sizes.epsilon)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"model_type": ["gpt2"]}, "model_type"),
        ({"model_type": "left out"}, "model_type"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_head": "two"}, "n_head"),
        ({"n_embd": "left out"}, "n_embd"),
        ({"n_inner": 4.5}, "n_inner"),
        ({"n_positions": None}, "n_positions"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
        ({"activation_function": 3}, "activation_function"),
    ],
)
def test_another_kind_is_refused_by_the_field(folder: Path, fields: dict[str, Any], named: str) -> None:
    change(folder, **fields)
    with pytest.raises(InputError) as error:
        find_language_model(str(folder))
    assert error.value.field == f"method.model.{named}"
    assert str(error.value.path).endswith("config.json")


def test_a_source_of_embeddings_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no layers to learn with") as error:
        find_language_model("bag-of-words")
    assert (error.value.field, error.value.found) == ("method.model", "bag-of-words")
    assert error.value.path is None


def test_one_that_is_absent_names_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not a language model's configuration"):
        find_language_model(str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="hf download gpt2`, or pass the folder") as error:
        find_language_model("gpt2")
    assert error.value.field == "method.model"
    assert "minilm" not in str(error.value)


def test_its_weights_are_layers_and_words(folder: Path) -> None:
    from transformers import GPT2LMHeadModel

    blocks, words = load_language_model(find_language_model(str(folder)))
    own = GPT2LMHeadModel.from_pretrained(folder)
    expected = dict(own.transformer.named_parameters())
    assert torch.equal(words.tokens, own.lm_head.weight)
    assert torch.equal(words.positions, expected["wpe.weight"])
    assert blocks.keys() == expected.keys() - {"wte.weight", "wpe.weight"}
    for name, weight in blocks.items():
        assert torch.equal(weight, expected[name])
        assert not weight.requires_grad
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot load the language model") as error:
        load_language_model(find_language_model(str(folder)))
    assert error.value.field == "method.model"
