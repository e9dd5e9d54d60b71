"""Text for the language loss: found on this machine and identified by its hash. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from llmdpd.errors import InputError, located
from llmdpd.methods.lamo.language_model import LanguageModel
from llmdpd.prompts.cache import default_cache_folder
from llmdpd.prompts.transformer import attempt_load
from llmdpd.utils.extras import check_installed, extra
from llmdpd.utils.files import atomic_write_bytes, file_sha256
from llmdpd.utils.tensors import read_tensors

_log = logging.getLogger(__name__)
_LAMO = "method.corpus"
_LINES = 4096
_SUFFIXES = (".txt", ".parquet")
_COLUMN = "text"
# train-00000-of-00002.parquet, wiki.train.tokens.txt
_TRAINING = re.compile(r"(^|[._-])train([._-]|$)")


@dataclass(frozen=True)
class Corpus:
    """Text that was found: its requested name, its files in order, and the option that requested it (for errors)."""

    name: str
    files: tuple[Path, ...]
    field: str = _LAMO

    def sha256(self) -> str:
        """Of the files' contents, in their order."""
        return hashlib.sha256("".join(file_sha256(file) for file in self.files).encode()).hexdigest()


def find_corpus(spec: str, field: str = _LAMO) -> Corpus:
    """Find a corpus.

    Args:
        spec: a file or a folder of text (.txt) or parquet (column `text`); or the hub id of a data set in the hub's
            cache, with a folder of it after a colon. If file names mark a training part, only that part is read.
        field: the option that it was given by, which errors name.

    Raises:
        InputError: it is not here (naming the command that fetches it), holds no such file, or parquet files, and
            pyarrow is not installed.
    """
    path = Path(spec).expanduser()
    if not (spec and path.exists()):
        repository, _, folder = spec.partition(":")
        path = _hub_folder(repository, folder, field)
    corpus = Corpus(spec, _text_files(path, field), field)
    parquet = [file for file in corpus.files if file.suffix == ".parquet"]
    if parquet:
        with located(parquet[0]):
            check_installed("lamo", "pyarrow", field=field)
    return corpus


def _text_files(path: Path, field: str) -> tuple[Path, ...]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix in _SUFFIXES]
    parts = [file for file in files if _TRAINING.search(file.stem)]
    if not files:
        found = "a file of another kind" if path.is_file() else "a folder without such files"
        expected = f"files ending in {' or '.join(_SUFFIXES)}"
        raise InputError("no text to learn from", path=path, field=field, found=found, expected=expected)
    return tuple(parts or files)


def _hub_folder(repository: str, folder: str, field: str) -> Path:
    with extra("lamo"):
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HFValidationError

    try:
        cache = constants.HF_HUB_CACHE
        place = Path(snapshot_download(repository, repo_type="dataset", local_files_only=True, cache_dir=cache), folder)
        if place.is_dir():
            return place
        found = f"a copy in the Hugging Face cache, without {folder}"
    except HFValidationError:
        expected = "a file, a folder, or the hub id of a data set"
        raise InputError("no such corpus", field=field, found=repr(repository), expected=expected) from None
    except OSError:
        found = "no copy in the Hugging Face cache, and no file or folder of this name"
    only = f' --include "{folder}/*"' if folder else ""
    hint = f"fetch it with `hf download --repo-type dataset {repository}{only}`, or pass a text file of your own"
    hint += "; or leave the language loss out: --method.language-weight 0" if field == _LAMO else ""
    problem = f"the corpus {repository} is not on this machine"
    raise InputError(problem, path=constants.HF_HUB_CACHE, field=field, found=found, hint=hint)


def read_tokens(corpus: Corpus, model: LanguageModel) -> Tensor:
    """The corpus as the language model's tokens, int32 [N], one text after the other.

    They are kept in the cache folder under the hashes of text and model: WikiText-103 takes minutes.

    Raises:
        InputError: text that can't be read, or no token at all.
    """
    key = hashlib.sha256(f"{corpus.sha256()} {model.source.model_id} {model.source.revision}".encode()).hexdigest()
    memo = default_cache_folder().parent / "corpora" / f"{key}.safetensors"
    if memo.is_file():
        try:
            return read_tensors(memo)["tokens"]
        except (InputError, KeyError) as error:
            _log.warning("cached tokens cannot be read, making them again: %s (%s)", memo, error)
    with extra("lamo"):
        from transformers import AutoTokenizer

    tokens = tokenize(corpus, attempt_load(model.source, AutoTokenizer.from_pretrained))
    try:
        atomic_write_bytes(memo, safetensors.torch.save({"tokens": tokens}))
    except OSError as error:
        _log.warning("cannot keep the corpus's tokens in %s: %s", memo.parent, error)
    return tokens


def tokenize(corpus: Corpus, tokenizer: Any) -> Tensor:
    """The corpus as tokens of one of transformers' tokenizers, int32 [N].

    Raises:
        InputError: text that can't be read, or no token at all.
    """
    options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    parts = [
        np.array([token for text in tokenizer(texts, **options)["input_ids"] for token in text], np.int32)
        for texts in read_texts(corpus)
    ]
    tokens = torch.from_numpy(np.concatenate([*parts, np.zeros(0, np.int32)]))
    if not len(tokens):
        raise InputError("no text to learn from", path=corpus.files[0], field=corpus.field, found="no token")
    return tokens


def read_texts(corpus: Corpus) -> Iterator[list[str]]:
    """Lines of text files, rows of parquet files, some thousands at a time.

    Raises:
        InputError: text that can't be read.
    """
    for file in corpus.files:
        if file.suffix == ".parquet":
            yield from _rows(file, corpus.field)
            continue
        try:
            with file.open(encoding="utf-8") as lines:
                while texts := list(itertools.islice(lines, _LINES)):
                    yield texts
        except UnicodeDecodeError as error:
            found = str(error)
            raise InputError("not a text file", path=file, field=corpus.field, found=found, expected="UTF-8") from None


def _rows(file: Path, field: str) -> Iterator[list[str]]:
    with extra("lamo"):
        import pyarrow
        import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if _COLUMN not in table.schema_arrow.names:
            found = ", ".join(table.schema_arrow.names)
            raise InputError("no column of texts", path=file, field=field, found=found, expected=_COLUMN)
        for batch in table.iter_batches(_LINES, columns=[_COLUMN]):
            yield [text for text in batch.column(0).to_pylist() if text]
    except InputError:
        raise
    except Exception as error:  # pyarrow raises its own, OSError, and what Python does of texts that are none
        found = f"{type(error).__name__}: {error}"[:300]
        raise InputError("broken parquet file", path=file, field=field, found=found) from None
