"""The text model without a language model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.prompts import LLMEncoder

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def encoder(cache_dir: Path) -> LLMEncoder:
    return LLMEncoder("bag-of-words", cache_dir=cache_dir, instruction="")


def signs(word: str) -> list[float]:
    """A word's vector, bit by bit."""
    number = int.from_bytes(hashlib.shake_256(word.encode()).digest(48), "big")
    return [1.0 if number >> (383 - place) & 1 else -1.0 for place in range(384)]


def test_a_text_is_the_mean_of_its_words(encoder: LLMEncoder, rng: np.random.Generator) -> None:
    assert encoder.dim == 384
    words = [f"w{number}" for number in rng.integers(0, 50, 12)]
    found = encoder.encode([" ".join(words), "Straße, 2 cm"])
    expected = [np.mean([signs(word) for word in group], axis=0) for group in (words, ["strasse", "2", "cm"])]
    torch.testing.assert_close(found, torch.tensor(np.array(expected), dtype=torch.float32))
    assert len(torch.unique(encoder.encode([f"w{number}" for number in range(20)]), dim=0)) == 20


def test_neither_order_nor_case_counts_but_the_number_does(encoder: LLMEncoder, rng: np.random.Generator) -> None:
    words = ["push", "the", "red", "puck", "to", "the", "goal"]
    first, mixed, other = encoder.encode(
        [" ".join(words), ", ".join(rng.permutation(words)).upper(), "push red puck to the goal"]
    )
    assert torch.equal(first, mixed)
    assert not torch.equal(first, other)


def test_instruction_and_limit_count_words(cache_dir: Path) -> None:
    longer = LLMEncoder("bag-of-words", cache_dir=cache_dir, instruction="Do this.", max_tokens=4)
    plain = LLMEncoder("bag-of-words", cache_dir=cache_dir, instruction="")
    assert torch.equal(longer.encode(["lift it"]), plain.encode(["do this lift it"]))
    with pytest.raises(InputError, match="5 words with the instruction"):
        longer.encode(["lift it up"])


def test_a_text_without_words_is_refused(encoder: LLMEncoder) -> None:
    with pytest.raises(InputError, match="no word") as error:
        encoder.encode(["… !"])
    assert error.value.found == "'… !'"


def test_its_identity_is_no_language_models(encoder: LLMEncoder, cache_dir: Path) -> None:
    assert encoder.identity.model == "bag-of-words"
    assert encoder.identity != LLMEncoder("minilm", cache_dir=cache_dir).identity
    encoder.release()
    assert encoder.encode(["again"]).shape == (1, 384)
