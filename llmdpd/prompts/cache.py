"""Embeddings on disk, so that the LLM reads each text once. Safe for several processes at once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llmdpd.utils.files import atomic_write_bytes
from llmdpd.utils.system import user

_log = logging.getLogger(__name__)
_SCHEMA = 1


@dataclass(frozen=True)
class EmbeddingKey:
    """Everything that an embedding depends on."""

    model: str
    """Hub id, or the name under which the model was found."""
    revision: str
    """The hub's commit, or a hash of the model folder's content."""
    pooling: str
    instruction: str
    text: str
    max_tokens: int | None
    dtype: str
    """What the LLM computed in; the embedding itself is float32."""

    def canonical(self) -> str:
        """The key as one JSON text, equal only for equal keys."""
        return json.dumps({"schema": _SCHEMA, **asdict(self)}, sort_keys=True)

    def digest(self) -> str:
        """SHA-256 of the key, hexadecimal: the file's name."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


class EmbeddingCache:
    """A folder with one safetensors file an embedding, named by its key's hash.

    A file is believed only if the whole key and a checksum of the numbers, both kept in its header, agree; otherwise
    a warning is logged and the embedding counts as absent, so that it is computed and written again. Files are
    written atomically: of two processes that write the same key at once, one wins, and both wrote the same numbers.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = default_cache_folder() if folder is None else Path(folder)

    def path(self, key: EmbeddingKey) -> Path:
        """Where the embedding of `key` lies if there is one."""
        return self.folder / f"{key.digest()}.safetensors"

    def get(self, key: EmbeddingKey) -> NDArray[np.float32] | None:
        """The embedding [dim], or None where there is none to be trusted."""
        path = self.path(key)
        if not os.path.isfile(path):  # also where nothing may be looked for
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                metadata, vector = file.metadata() or {}, file.get_tensor("embedding")
        except (OSError, SafetensorError) as error:
            fault = f"cannot be read ({error})"
        else:
            if metadata.get("key") != key.canonical():
                fault = "belongs to another key"
            elif vector.dtype != np.float32 or vector.ndim != 1 or metadata.get("sha256") != _checksum(vector):
                fault = "was altered"
            else:
                return np.asarray(vector)
        _log.warning("cached embedding %s, computing it again: %s", fault, path)
        return None

    def put(self, key: EmbeddingKey, vector: NDArray[np.float32]) -> None:
        """Store an embedding [dim]. A folder that can't be written to only costs a warning."""
        vector = np.ascontiguousarray(vector, dtype=np.float32)
        metadata = {"key": key.canonical(), "sha256": _checksum(vector)}
        try:
            atomic_write_bytes(self.path(key), save({"embedding": vector}, metadata=metadata))
        except OSError as error:
            _log.warning("cannot keep an embedding in %s: %s", self.folder, error)


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/llmdpd/embeddings`, or `~/.cache/llmdpd/embeddings` where that variable is unset or relative.

    Of a user who has no home, a folder of theirs among the temporary ones.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification requires relative paths to be ignored.
    own = Path(os.path.expanduser("~"))
    usual = own / ".cache" if own.is_absolute() else Path(tempfile.gettempdir()) / f"cache-{user()}"
    return (home if home.is_absolute() else usual) / "llmdpd" / "embeddings"


def _checksum(vector: NDArray[np.float32]) -> str:
    return hashlib.sha256(vector.tobytes()).hexdigest()
