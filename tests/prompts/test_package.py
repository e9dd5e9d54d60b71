from __future__ import annotations

import subprocess
import sys

import pytest

import llmdpd.prompts

HEAVY = ("torch", "transformers", "gymnasium", "metaworld", "huggingface_hub", "safetensors")


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_the_package_pulls_nothing_heavy_in() -> None:
    assert modules_after("import llmdpd.prompts") == set()
    assert modules_after("from llmdpd.prompts import TextPrompt, metaworld_prompt; metaworld_prompt('push')") == set()


def test_the_encoder_does_without_transformers_until_a_text_is_new() -> None:
    assert "transformers" not in modules_after("from llmdpd.prompts import LLMEncoder; LLMEncoder('minilm')")


def test_every_exported_name_exists() -> None:
    for name in set(llmdpd.prompts.__all__) - {"TEXT_MODELS"}:
        assert getattr(llmdpd.prompts, name).__name__ == name
    assert set(llmdpd.prompts.__all__) <= set(dir(llmdpd.prompts))
    with pytest.raises(AttributeError, match="no_such_name"):
        llmdpd.prompts.no_such_name  # noqa: B018
