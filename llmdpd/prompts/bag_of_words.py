"""A text's words without any knowledge of them: what a language model has to beat."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmdpd.errors import InputError
from llmdpd.prompts.models import TextModel
from llmdpd.prompts.source import ModelSource

if TYPE_CHECKING:
    import torch

_WIDTH = 384  # MiniLM's
_WORD = re.compile(r"\w+")


class WordSigns:
    """Embeds a text as the mean over its words of one vector of random signs a word, in any order and any case.

    That is a random projection of the counts of its words (random indexing, Kanerva et al. 2000), for any vocabulary:
    the signs are bits of the word's SHAKE-256, the same on every machine.

    Args:
        max_words: the most words of a prompt; None: any number.
    """

    dim = _WIDTH

    def __init__(self, max_words: int | None = None) -> None:
        self.max_words = max_words

    def embed(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [P, 384] of P prompts.

        Raises:
            InputError: a prompt without words, or with more than allowed.
        """
        return np.stack([self._embed_one(prompt) for prompt in prompts])

    def release(self) -> None:
        """Do nothing: no model is in memory."""

    def _embed_one(self, prompt: str) -> NDArray[np.float32]:
        words = _WORD.findall(prompt.casefold())
        if not words:
            problem, expected = "no word in a text prompt", "letters or digits"
            raise InputError(problem, found=repr(prompt[:80]), expected=expected)
        if self.max_words is not None and len(words) > self.max_words:
            found = f"{len(words)} words with the instruction"
            raise InputError("text prompt too long", found=found, expected=f"at most {self.max_words}")
        # Sorted, so that the sum's rounding does not depend on the order either.
        return np.mean([_signs(word) for word in sorted(words)], axis=0, dtype=np.float32)


class BagOfWords(TextModel):
    """No language model: see `WordSigns`."""

    def find(self, memo_folder: Path) -> ModelSource:
        return ModelSource("bag-of-words", f"signs by SHAKE-256, {_WIDTH}", Path(__file__).parent)

    def open(
        self, source: ModelSource, device: torch.device, dtype: torch.dtype, max_tokens: int | None = None
    ) -> WordSigns:
        return WordSigns(max_tokens)


BAG_OF_WORDS = BagOfWords()


def _signs(word: str) -> NDArray[np.float32]:
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(word.encode()).digest(_WIDTH // 8), np.uint8))
    return 2 * bits.astype(np.float32) - 1
