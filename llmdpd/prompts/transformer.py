"""Text embeddings by a model that `transformers` loads: the mean of its last hidden layer over all tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmdpd.errors import InputError, abridged
from llmdpd.prompts.source import ModelSource
from llmdpd.utils.extras import extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformerEmbedder:
    """A model and its tokenizer, loaded when the first prompt comes.

    Args:
        source: where its files lie.
        device: where it runs.
        dtype: what it computes in.
        max_tokens: the most tokens of a prompt; by default what the model has positions for.
    """

    def __init__(
        self, source: ModelSource, device: torch.device, dtype: torch.dtype, max_tokens: int | None = None
    ) -> None:
        self.source, self.device, self.dtype, self.max_tokens = source, device, dtype, max_tokens
        self._dim: int | None = None
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase, int | None] | None = None

    @property
    def dim(self) -> int:
        """Width of an embedding, from the model's configuration; does not load the model."""
        if self._dim is None:
            with extra("llm"):
                from transformers import AutoConfig

            config = attempt_load(self.source, AutoConfig.from_pretrained)
            if config.is_encoder_decoder:
                raise InputError(
                    "an encoder-decoder model can't be used", path=self.source.folder, found=config.model_type,
                    expected="a model of one stack, such as BERT, Llama or OLMo",
                )  # fmt: skip
            self._dim = int(config.get_text_config().hidden_size)
        return self._dim

    def release(self) -> None:
        """Free the model's memory; it is loaded again when another prompt comes."""
        self._loaded = None

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [P, dim] of P prompts, padded to one pass.

        Raises:
            InputError: a prompt with more tokens than allowed, or numbers that are not finite.
        """
        model, tokenizer, limit = self._load()
        tokens = [self._tokenize(tokenizer, prompt, limit) for prompt in prompts]
        # Padding comes last, so that no token's position depends on it. By hand, because Llama's and OLMo's tokenizers
        # may lack a padding token; which id stands there is masked.
        ids = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id or 0).to(self.device)
        mask = pad_sequence([torch.ones_like(part) for part in tokens], batch_first=True).to(self.device)
        vectors = masked_mean(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask).cpu()
        if not torch.isfinite(vectors).all():
            problem, hint = "the language model gives values that are not finite", "try dtype float32"
            raise InputError(problem, path=self.source.folder, hint=f"it computed in {self.dtype}; {hint}")
        if vectors.shape[1] != self.dim:
            problem = "the language model's last layer has another width than its configuration says"
            raise InputError(problem, path=self.source.folder, found=vectors.shape[1], expected=self.dim)
        return vectors.numpy()

    def _tokenize(self, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int | None) -> Tensor:
        # A tokenizer's file can carry a truncation and a padding of its own (MiniLM's: 128): both are switched off.
        tokens = torch.tensor(tokenizer(prompt, truncation=False, padding=False, verbose=False)["input_ids"])
        if limit is not None and len(tokens) > limit:
            found, hint = f"{len(tokens)} tokens with the instruction", "shorten it, or use a model with more positions"
            problem = "text prompt too long for the language model"
            raise InputError(problem, found=found, expected=f"at most {limit}", hint=hint)
        return tokens

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int | None]:
        if self._loaded is None:
            with extra("llm"):
                from transformers import AutoTokenizer

            _ = self.dim  # a model that can't be used is refused before gigabytes are read
            tokenizer = attempt_load(self.source, AutoTokenizer.from_pretrained)
            model = load_model(self.source, self.dtype, self.device)
            self._loaded = model, tokenizer, self._limit(model, tokenizer)
        return self._loaded

    def _limit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # Tokenizers without a limit of their own report an astronomic number; the minimum takes care of it.
        bounds = [bound for bound in (positions, tokenizer.model_max_length) if bound]
        if self.max_tokens is not None and bounds and self.max_tokens > min(bounds):
            raise InputError(
                "the language model has fewer positions than requested", path=self.source.folder, field="max_tokens",
                found=self.max_tokens, expected=f"at most {min(bounds)}",
            )  # fmt: skip
        return self.max_tokens if self.max_tokens is not None else min(bounds, default=None)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens where `mask` [B, T] is not 0: hidden [B, T, D] of any floating type → float32 [B, D]."""
    weights = (mask != 0).unsqueeze(-1)
    # Not a product with the mask: NaN or Inf at a padded place must not leak in.
    total = hidden.float().masked_fill(~weights, 0.0).sum(dim=1)
    return total / weights.sum(dim=1)


def load_model(
    source: ModelSource, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", gguf_file: str = ""
) -> PreTrainedModel:
    """The model whose safetensors, or GGUF file of this name, lie in the source's folder.

    Raises:
        InputError: it can't be loaded, or weights are missing.
    """
    with extra("llm"):
        from transformers import AutoModel

    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    with no_progress_bars():
        model, info = attempt_load(source, AutoModel.from_pretrained, dtype=dtype, output_loading_info=True, **options)
    # transformers fills absent weights with random numbers. A pooler is not used here and may be absent.
    absent = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if absent:
        found = f"no {abridged(absent, 1)}"
        raise InputError("the language model's weights are incomplete", path=source.folder, found=found)
    return model.to(device).eval()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """While the block runs transformers draws no progress bars of its own."""
    with extra("llm"):
        from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            logging.enable_progress_bar()


def attempt_load(source: ModelSource, load: Any, **options: Any) -> Any:
    """Call one of transformers' loaders on the model's folder, offline and without code from it."""
    try:
        return load(source.folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # the libraries below raise dozens of types for a broken folder
        found = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        raise InputError("cannot load the language model", path=source.folder, found=found) from error
