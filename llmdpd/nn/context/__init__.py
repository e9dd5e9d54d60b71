"""Contexts: how prompts and state become the noise network's condition."""

from llmdpd.nn.context.base import (
    ALL_KEPT,
    Condition,
    Context,
    ContextConfig,
    EncodedPrompts,
    Keep,
    PooledContext,
    RetrievalConfig,
    spread,
)
from llmdpd.nn.context.retrieval import RetrievalContext
from llmdpd.nn.spaces import Spaces

__all__ = [
    "ALL_KEPT",
    "Condition",
    "Context",
    "ContextConfig",
    "EncodedPrompts",
    "Keep",
    "PooledContext",
    "RetrievalConfig",
    "RetrievalContext",
    "make_context",
    "spread",
]


def make_context(spaces: Spaces, config: ContextConfig) -> Context:
    """The context that the config names."""
    kinds: dict[str, type[Context]] = {"pooled": PooledContext, "retrieval": RetrievalContext}
    return kinds[config.kind](spaces, config)
