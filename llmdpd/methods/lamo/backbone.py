"""Language models that LaMo is made of: frozen layers of a GPT-2 or a Llama, with low-rank adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.nn.sequence_model import CausalTransformer, GPT2Sizes, causal_bias, check_activation
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, Fraction, WholeNumber, Width
from llmdpd.utils.extras import check_installed, extra

Family = Literal["gpt2", "llama"]


def check_peft() -> None:
    """Raise `InputError` where peft, which makes the adapters, is not installed."""
    check_installed("lamo", "peft", field="method")


@dataclass(frozen=True)
class LanguageSizes(GPT2Sizes):
    """What a language model's layers are built with; defaults are those of the smallest GPT-2."""

    family: Family = "gpt2"
    """Which layers they are."""
    key_value_heads: Annotated[int, Bounds(0, 16_384)] = 0
    """Of a Llama: heads of keys and values, each shared by as many heads; 0: of a GPT-2, as many as heads."""
    rope_theta: Annotated[float, Bounds(1)] = 10_000.0
    """Of a Llama: base of its rotary positions."""

    def check(self) -> None:
        """Raise `InputError` for heads that do not divide the width, or a Llama's fields that do not fit the family."""
        super().check()
        defaults = {name: getattr(LanguageSizes, name) for name in ("key_value_heads", "rope_theta")}
        for name, default in defaults.items():
            if self.family == "gpt2" and getattr(self, name) != default:
                raise InputError("only a Llama has this", field=name, found=getattr(self, name), expected=default)
        if self.family == "llama" and (not self.key_value_heads or self.heads % self.key_value_heads):
            problem, expected = "the heads cannot share keys and values", f"a divisor of {self.heads} (heads)"
            raise InputError(problem, field="key_value_heads", found=self.key_value_heads, expected=expected)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters of the attention's projections to query, key and value (Hu et al. 2021, arXiv 2106.09685).

    Sizes are LaMo's for its tasks of continuous control.
    """

    rank: Width = 16
    """Rank of the adapters' product; GPT-2 has one for the three projections together, a Llama one for each."""
    alpha: WholeNumber = 32
    """The product is scaled by alpha / rank."""
    dropout: Fraction = 0.1
    """Dropout of the adapters' input, probability."""


class AdaptedTransformer(nn.Module, ABC):
    """A causal transformer, all of whose weights are a language model's and frozen, but for adapters.

    A subclass makes the layers; `_adapt` gives these projections adapters, whose product is 0 at first.
    """

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [B, N, W] → [B, N, W]; mask [B, N]: which of them are there, None: all."""

    @abstractmethod
    def layers(self) -> nn.Module:
        """The language model without its words, as transformers has it, its adapters within."""

    def _adapt(self, lora: LoRAConfig, *projections: str, inputs_first: bool) -> None:
        # Imported here: it takes seconds, and only this method has a use for it.
        with extra("lamo"):
            from peft import LoraConfig, inject_adapter_in_model

        adapters = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(projections),
            fan_in_fan_out=inputs_first,
            bias="none",
        )
        inject_adapter_in_model(adapters, self.layers())

    def adapters(self) -> list[nn.Parameter]:
        """The adapters' weights."""
        return [weight for name, weight in self.layers().named_parameters() if ".lora_" in name]

    def frozen(self) -> list[nn.Parameter]:
        """The language model's own weights."""
        return list(self._own().values())

    def _own(self) -> dict[str, nn.Parameter]:
        """The language model's own weights by their names in transformers."""
        weights = self.layers().named_parameters()
        return {name.replace(".base_layer", ""): weight for name, weight in weights if ".lora_" not in name}

    @torch.no_grad()
    def load_blocks(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Take over a language model's layers: tensors by their names in transformers, and no more.

        Raises:
            InputError: a tensor that is missing, left over, or of another shape; `path` is the file or folder to name.
        """
        own = self._own()
        for name in sorted(own.keys() | tensors.keys()):
            found, wanted = (None if t is None else list(t.shape) for t in (tensors.get(name), own.get(name)))
            if found != wanted:
                problem = "the language model's weights do not fit its configuration"
                raise InputError(problem, path=path, field=name, found=found, expected=wanted)
            own[name].copy_(tensors[name])


class AdaptedGPT2(CausalTransformer, AdaptedTransformer):
    """GPT-2's layers with adapters on the attention's one projection to query, key and value."""

    def __init__(self, sizes: LanguageSizes, dropout: float, lora: LoRAConfig) -> None:
        super().__init__(sizes, dropout)
        self._adapt(lora, "c_attn", inputs_first=True)

    def layers(self) -> nn.Module:
        return self.gpt2


class AdaptedLlama(AdaptedTransformer):
    """A Llama's layers with adapters on the attention's projections to query, key and value.

    Tokens keep the rotary positions that the model was trained with. Dropout is the attention's: a Llama has no other.
    """

    def __init__(self, sizes: LanguageSizes, dropout: float, lora: LoRAConfig) -> None:
        super().__init__()
        with extra("lamo"):
            from transformers import LlamaConfig, LlamaModel

        check_activation(sizes.activation)
        rope: dict[str, Any] = {"rope_theta": sizes.rope_theta}  # transformers 5 converts it
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=sizes.width,
            intermediate_size=sizes.inner,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.key_value_heads,
            hidden_act=sizes.activation,
            rms_norm_eps=sizes.epsilon,
            attention_dropout=dropout,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            **rope,
        )
        self.llama = LlamaModel(config)
        self.llama.set_submodule("embed_tokens", nn.Identity())
        self._adapt(lora, "q_proj", "k_proj", "v_proj", inputs_first=False)

    def layers(self) -> nn.Module:
        return self.llama

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        with sharding.dropout():
            found = self.llama(inputs_embeds=tokens, attention_mask=causal_bias(tokens, mask))
        hidden: Tensor = found.last_hidden_state
        return hidden


def adapted_transformer(sizes: LanguageSizes, dropout: float, lora: LoRAConfig) -> AdaptedTransformer:
    """A language model's layers, from random weights, with adapters.

    Raises:
        InputError: peft is not installed, or an activation that transformers does not have.
    """
    check_peft()
    return (AdaptedLlama if sizes.family == "llama" else AdaptedGPT2)(sizes, dropout, lora)
