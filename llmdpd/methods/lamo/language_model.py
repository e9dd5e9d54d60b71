"""A GPT-2 or a Llama on this machine: its sizes and its weights. Nothing is downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmdpd.errors import InputError, located
from llmdpd.methods.lamo.backbone import Family, LanguageSizes
from llmdpd.prompts import TEXT_MODELS
from llmdpd.prompts.cache import default_cache_folder
from llmdpd.prompts.models import text_model
from llmdpd.prompts.source import ModelSource
from llmdpd.prompts.transformer import load_model
from llmdpd.utils.files import read_json

_EXPECTED = "a GPT-2 or a Llama: smollm2-135m, a hub id in the Hugging Face cache, or a folder"


@dataclass(frozen=True)
class _Format:
    """How a family's config.json says its sizes.

    needed: what these networks implement, as field → the only value. whole: size → field of a whole number. defaults:
    of fields that may be absent, unless what is needed is transformers' default, too.
    """

    needed: dict[str, Any]
    whole: dict[str, str]
    activation: str
    epsilon: str
    positions: str
    defaults: dict[str, Any]


_FORMATS: dict[Family, _Format] = {
    "gpt2": _Format(
        needed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
        whole={"layers": "n_layer", "heads": "n_head", "width": "n_embd", "inner": "n_inner"},
        activation="activation_function",
        epsilon="layer_norm_epsilon",
        positions="n_positions",
        defaults={"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    ),
    "llama": _Format(
        needed={
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "tie_word_embeddings": True,
        },
        whole={
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "width": "hidden_size",
            "inner": "intermediate_size",
            "key_value_heads": "num_key_value_heads",
        },
        activation="hidden_act",
        epsilon="rms_norm_eps",
        positions="max_position_embeddings",
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    ),
}


@dataclass(frozen=True)
class LanguageModel:
    """A language model that was found: where it lies, the sizes of its layers, tokens that it has positions for."""

    source: ModelSource
    sizes: LanguageSizes
    positions: int


@dataclass(frozen=True)
class Words:
    """Token embeddings [V, W], which are the output layer too, and position embeddings [N, W]; a Llama has none."""

    tokens: Tensor
    positions: Tensor | None


def find_language_model(name: str) -> LanguageModel:
    """Find a GPT-2 or a Llama by its name and read its sizes; its weights are not read.

    Args:
        name: one of `llmdpd.prompts.TEXT_MODELS`, a hub id in the hub's cache, or a folder.

    Raises:
        InputError: it is not here (naming the command that fetches it), or is of a kind that is not implemented.
    """
    try:
        source = text_model(name).find(default_cache_folder() / "fingerprints")
    except InputError as error:
        hint = None
        if error.hint and name in TEXT_MODELS:
            hint = error.hint.partition(";")[0]  # after it come models for prompts, which are of no use here
        elif error.hint:
            hint = (
                f"fetch it with `hf download {name}`, or pass the folder of a copy: --method.model DIR; "
                "`python -m llmdpd.pretrain` makes a small one from a text"
            )
        raise InputError(
            error.problem, path=error.path, field="method.model", found=error.found, expected=_EXPECTED, hint=hint
        ) from None
    if not (source.folder / "config.json").is_file():  # as of a source of embeddings that is no network
        problem = "this has no layers to learn with"
        raise InputError(problem, field="method.model", found=name, expected=_EXPECTED)
    with located(field="method.model"):
        return _read_sizes(source)


def _read_sizes(source: ModelSource) -> LanguageModel:
    path = source.folder / "config.json"
    read = read_json(path)
    if not isinstance(read, dict):
        raise InputError("not a language model's configuration", path=path, found=type(read).__name__)
    family = read.get("model_type")
    if not isinstance(family, str) or family not in _FORMATS:  # it may be a list, which no dict looks up
        problem, expected = "lamo is made of a GPT-2 or a Llama", " or ".join(_FORMATS)
        raise InputError(problem, path=path, field="model_type", found=family, expected=expected)
    form = _FORMATS[family]
    given = {**form.needed, **form.defaults, **read}
    for name, expected in form.needed.items():
        if given[name] != expected:
            problem = f"a {family} of a kind that lamo does not implement"
            raise InputError(problem, path=path, field=name, found=given[name], expected=expected)
    _fill(given, family, path)
    numbers: dict[str, Any] = {own: _whole(given, name, path) for own, name in form.whole.items()}
    epsilon, activation = given[form.epsilon], given[form.activation]
    if not isinstance(epsilon, float) or not isinstance(activation, str):
        name = form.epsilon if isinstance(activation, str) else form.activation
        raise InputError("wrong value in a language model's configuration", path=path, field=name, found=given[name])
    if family == "llama":
        numbers["rope_theta"] = _rope_theta(given, path)
    sizes = LanguageSizes(**numbers, activation=activation, epsilon=epsilon, family=family)
    return LanguageModel(source, sizes, _whole(given, form.positions, path))


def _fill(given: dict[str, Any], family: Family, path: Path) -> None:
    """Put in what a configuration leaves to be derived from other sizes; refuse heads of a width of their own."""
    if family == "gpt2":
        if given["n_inner"] is None:
            given["n_inner"] = 4 * _whole(given, "n_embd", path)
        return
    heads, width = (_whole(given, name, path) for name in ("num_attention_heads", "hidden_size"))
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = heads
    if given.get("head_dim") not in (None, width // heads):
        problem, expected = "a llama of a kind that lamo does not implement", f"{width // heads} (hidden_size / heads)"
        raise InputError(problem, path=path, field="head_dim", found=given["head_dim"], expected=expected)


def _rope_theta(given: dict[str, Any], path: Path) -> float:
    """The base of a Llama's rotary positions; transformers 5 writes it within `rope_parameters`, 4 beside the sizes."""
    rope = given.get("rope_parameters")
    if rope is None:
        rope = {"rope_theta": given.get("rope_theta", 10_000.0)}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        problem, expected = "a llama of a kind that lamo does not implement", "rope_type default"
        raise InputError(problem, path=path, field="rope_parameters", found=rope, expected=expected)
    theta = rope.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 1 <= theta < math.inf:
        problem, expected = "wrong value in a language model's configuration", "a number, at least 1"
        raise InputError(problem, path=path, field="rope_theta", found=repr(theta), expected=expected)
    return float(theta)


def _whole(given: dict[str, Any], name: str, path: Path) -> int:
    value = given.get(name)
    if type(value) is not int or value < 1:
        problem, expected = "wrong value in a language model's configuration", "a whole number, at least 1"
        raise InputError(problem, path=path, field=name, found=repr(value), expected=expected)
    return value


def load_language_model(model: LanguageModel) -> tuple[dict[str, Tensor], Words]:
    """The layers, by their names in transformers, and the embeddings; float32, on the CPU.

    Raises:
        InputError: weights that can't be read or are incomplete.
    """
    with located(field="method.model"):
        loaded = load_model(model.source, torch.float32, torch.device("cpu"))
    tensors = {name: weight.detach() for name, weight in loaded.named_parameters()}
    if model.sizes.family == "llama":
        return tensors, Words(tensors.pop("embed_tokens.weight"), None)
    words = Words(tensors.pop("wte.weight"), tensors.pop("wpe.weight"))
    return tensors, words
