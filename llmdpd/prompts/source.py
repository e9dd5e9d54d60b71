"""Which language model it is: where its files lie, and what an embedding came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelSource:
    """A model found on disk: `model_id` and `revision` identify it, `folder` holds its files."""

    model_id: str
    revision: str
    folder: Path


@dataclass(frozen=True)
class LLMIdentity:
    """The origin of an embedding: the model, its hub commit or the hash of its files, and its precision."""

    model: str
    revision: str
    dtype: str
