"""Texts that a policy knows need no LLM; new ones are embedded as in training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.policy.policy import Policy
from llmdpd.prompts.source import LLMIdentity

D = 10
KNOWN = "Task: push the puck."
MakePolicy = Callable[..., Policy]


KNOWN_TEXT = """
import sys
import numpy as np
from llmdpd import Policy
policy = Policy.load(sys.argv[1]).prompt(text=sys.argv[2], trajectory=(np.ones((4, 7)), np.ones((4, 3))))
policy.act(np.ones(7))
heavy = ["transformers", "gymnasium", "metaworld", "minari", "h5py", "huggingface_hub", "torch._dynamo"]
print(*[name for name in heavy if name in sys.modules])
"""


def test_a_known_text_needs_no_llm(make_policy: MakePolicy, tmp_path: Path) -> None:
    """Deployment: the policy folder alone, neither the LLM, an environment nor torch.compile is imported."""
    make_policy().save(tmp_path / "p")
    done = subprocess.run(
        [sys.executable, "-c", KNOWN_TEXT, str(tmp_path / "p"), KNOWN], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def fake_encoder(asked: list[tuple[Any, ...]], width: int = D) -> type:
    class Encoder:
        def __init__(self, model: str, device: torch.device, dtype: str | None) -> None:
            self.called = (model, device, dtype)
            self.identity = LLMIdentity("m", "r2", dtype or "float32")

        def encode(self, texts: list[str]) -> torch.Tensor:
            asked.append((*self.called, list(texts)))
            return torch.ones(len(texts), width)

    return Encoder


def test_a_new_text_is_embedded_as_in_training(
    make_policy: MakePolicy,
    example: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once for each text."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("llmdpd.prompts.llm.LLMEncoder", fake_encoder(asked))
    policy = make_policy()
    for _ in range(2):
        policy.prompt("Task: something new.", example)
    assert asked == [("minilm", torch.device("cpu"), None, ["Task: something new."])]
    for number, (revision, told) in enumerate((("r2", False), ("r1", True))):
        policy.metadata["llm"] = {"model": "m", "revision": revision, "dtype": "bfloat16"}
        policy.save(tmp_path / "p")
        caplog.clear()
        Policy.load(tmp_path / "p").prompt(f"Task: new {number}.", example)
        assert asked[-1][2] == "bfloat16"
        assert ("another one than in training" in caplog.text) == told


def test_a_text_model_of_another_width(make_policy: MakePolicy, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmdpd.prompts.llm.LLMEncoder", fake_encoder([], D + 1))
    policy = make_policy()
    for _ in range(2):
        with pytest.raises(InputError, match="another width") as error:
            policy.prompt("Task: something new.", example)
        assert str(D) in str(error.value.expected)
        assert str(D + 1) in str(error.value.found)
