"""A GPT-2 on this machine: its sizes and its weights. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmdpd.errors import InputError, located
from llmdpd.nn.sequence_model import GPT2Sizes
from llmdpd.prompts.cache import default_cache_folder
from llmdpd.prompts.models import text_model
from llmdpd.prompts.source import ModelSource
from llmdpd.prompts.transformer import load_model
from llmdpd.utils.files import read_json

_EXPECTED = "the hub id of a GPT-2 in the Hugging Face cache, or the folder of one"
# Variants of GPT-2 that these networks do not implement.
_NEEDED = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_OWN = {"layers": "n_layer", "heads": "n_head", "width": "n_embd", "inner": "n_inner"}
_DEFAULTS = {**_NEEDED, "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


@dataclass(frozen=True)
class LanguageModel:
    """A GPT-2 that was found: where it lies, the sizes of its layers, tokens that it has positions for."""

    source: ModelSource
    sizes: GPT2Sizes
    positions: int


@dataclass(frozen=True)
class Words:
    """Token embeddings [V, W], which are the output layer too, and position embeddings [N, W]."""

    tokens: Tensor
    positions: Tensor


def find_language_model(name: str) -> LanguageModel:
    """Find a GPT-2 by its hub id in the hub's cache, or by its folder, and read its sizes; its weights are not read.

    Raises:
        InputError: it is not here (naming the command that fetches it), is no GPT-2, or one of another kind.
    """
    try:
        source = text_model(name).find(default_cache_folder() / "fingerprints")
    except InputError as error:
        # Language models for prompts that are no GPT-2 are of no use here.
        fetch = (
            f"fetch it with `hf download {name}`, or pass the folder of a copy: --method.model DIR; "
            "`python -m llmdpd.pretrain` makes a small one from a text"
        )
        hint = fetch if error.hint else None
        raise InputError(
            error.problem, path=error.path, field="method.model", found=error.found, expected=_EXPECTED, hint=hint
        ) from None
    with located(field="method.model"):
        return _read_sizes(source)


def _read_sizes(source: ModelSource) -> LanguageModel:
    path = source.folder / "config.json"
    read = read_json(path)
    if not isinstance(read, dict):
        raise InputError("not a language model's configuration", path=path, found=type(read).__name__)
    given = {**_DEFAULTS, "model_type": None, **read}
    for name, expected in _NEEDED.items():
        if given[name] != expected:
            raise InputError("lamo is made of a GPT-2", path=path, field=name, found=given[name], expected=expected)
    if given["n_inner"] is None:
        given["n_inner"] = 4 * _whole(given, "n_embd", path)
    numbers = {own: _whole(given, name, path) for own, name in _OWN.items()}
    epsilon, activation = given["layer_norm_epsilon"], given["activation_function"]
    if not isinstance(epsilon, float) or not isinstance(activation, str):
        name = "layer_norm_epsilon" if isinstance(activation, str) else "activation_function"
        raise InputError("wrong value in a language model's configuration", path=path, field=name, found=given[name])
    sizes = GPT2Sizes(**numbers, activation=activation, epsilon=epsilon)
    return LanguageModel(source, sizes, _whole(given, "n_positions", path))


def _whole(given: dict[str, Any], name: str, path: Path) -> int:
    value = given.get(name)
    if type(value) is not int or value < 1:
        problem, expected = "wrong value in a language model's configuration", "a whole number, at least 1"
        raise InputError(problem, path=path, field=name, found=repr(value), expected=expected)
    return value


def load_language_model(model: LanguageModel) -> tuple[dict[str, Tensor], Words]:
    """The layers, by their names in `transformers.GPT2Model`, and the embeddings; float32, on the CPU.

    Raises:
        InputError: weights that can't be read or are incomplete.
    """
    with located(field="method.model"):
        loaded = load_model(model.source, torch.float32, torch.device("cpu"))
    tensors = {name: weight.detach() for name, weight in loaded.named_parameters()}
    words = Words(tensors.pop("wte.weight"), tensors.pop("wpe.weight"))
    return tensors, words
