"""Prompts: structured text, its embedding by a frozen LLM, and the demonstration.

Names are imported when first used, so that this package needs neither transformers nor an environment.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import TYPE_CHECKING

from llmdpd.utils.registry import Registry

if TYPE_CHECKING:
    from llmdpd.prompts.llm import LLMEncoder
    from llmdpd.prompts.models import TextModel
    from llmdpd.tasks.metaworld.prompts import metaworld_prompt
    from llmdpd.tasks.texts.gymnasium_docs import environment_prompt
    from llmdpd.tasks.texts.text_prompt import TextPrompt

_HOMES = {
    "LLMEncoder": "llmdpd.prompts.llm",
    "TextPrompt": "llmdpd.tasks.texts.text_prompt",
    "environment_prompt": "llmdpd.tasks.texts.gymnasium_docs",
    "metaworld_prompt": "llmdpd.tasks.metaworld.prompts",
}

TEXT_MODELS: Registry[TextModel] = Registry(
    "language model",
    "llmdpd.text_models",
    {
        "minilm": "llmdpd.prompts.models:MINILM",
        "smollm2-135m": "llmdpd.prompts.gguf:SMOLLM2_135M",
        "bag-of-words": "llmdpd.prompts.bag_of_words:BAG_OF_WORDS",
        "llama-3-8b": "llmdpd.prompts.models:LLAMA_3_8B",
        "olmo-1b": "llmdpd.prompts.models:OLMO_1B",
    },
)
"""Language models by name, each a `llmdpd.prompts.models.TextModel`; packages add theirs as entry points."""

__all__ = ["TEXT_MODELS", "LLMEncoder", "TextPrompt", "environment_prompt", "metaworld_prompt", "task_prompt"]


def task_prompt(task: str) -> TextPrompt:
    """The text prompt of a task in any spelling, as its suite describes it.

    Raises:
        InputError: no suite knows the task, or its suite's description is no text prompt.
    """
    from llmdpd.tasks import SUITES

    return _prompt(task, SUITES.version)


@lru_cache(maxsize=128)
def _prompt(task: str, version: int) -> TextPrompt:
    from llmdpd.tasks.specs import suite_of
    from llmdpd.tasks.texts.text_prompt import TextPrompt

    suite = suite_of(task)
    return TextPrompt.parse(suite.description(suite.canonical(task)))


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
