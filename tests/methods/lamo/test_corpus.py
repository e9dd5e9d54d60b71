"""Finding text for the language loss, and reading it as tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.methods.lamo import corpus as module
from llmdpd.methods.lamo.corpus import find_corpus, read_tokens
from llmdpd.methods.lamo.language_model import LanguageModel, find_language_model

WIKITEXT = "Salesforce/wikitext:wikitext-103-raw-v1"
WORDS = ["<unk>", "the", "puck", "goes", "to", "a", "goal", "and", "stays", "there", "door", "opens", "again"]


@pytest.fixture
def model(tiny_gpt2: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """The tiny GPT-2; its cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return find_language_model(str(tiny_gpt2[0]))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Makes the folder of WikiText in a Hugging Face cache that is empty before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def make() -> Path:
        repository, commit = tmp_path / "hub" / "datasets--Salesforce--wikitext", "0123456789" * 4
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        folder = repository / "snapshots" / commit / "wikitext-103-raw-v1"
        folder.mkdir(parents=True)
        return folder

    return make


def words_of(text: str) -> list[int]:
    return [WORDS.index(word) if word in WORDS else 0 for word in text.split()]


def test_text_is_read_in_order(model: LanguageModel, tmp_path: Path, rng: np.random.Generator) -> None:
    texts = [" ".join(rng.choice([*WORDS[1:], "ghost"], 40)) + "\n\n" for _ in range(3)]
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.txt", "deep/c.txt"), texts, strict=True):
        (folder / name).write_text(text)
    (folder / "notes.md").write_text("again")
    assert read_tokens(find_corpus(str(folder)), model).tolist() == words_of("".join(texts))
    assert read_tokens(find_corpus(str(folder / "b.txt")), model).tolist() == words_of(texts[1])
    # Of a data set in parts only the one to train on.
    (folder / "train-0.txt").write_text("the door\n")
    assert read_tokens(find_corpus(str(folder)), model).tolist() == words_of("the door")


def test_long_files_are_read_in_parts(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(module, "_LINES", 3)
    lines = [" ".join(rng.choice(WORDS[1:], rng.integers(1, 5))) for _ in range(int(rng.integers(7, 18)))]
    file = tmp_path / "text.txt"
    file.write_text("the\n" + "\n".join(lines))
    assert read_tokens(find_corpus(str(file)), model).tolist() == words_of("the " + " ".join(lines))


def test_tokens_are_kept_for_the_same_text_and_model(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the puck goes\n")
    first = read_tokens(find_corpus(str(file)), model)
    with monkeypatch.context() as patch:
        patch.setattr(module, "tokenize", None)
        assert read_tokens(find_corpus(str(file)), model).tolist() == first.tolist()
    before = find_corpus(str(file)).sha256()
    file.write_text("the door opens\n")
    assert find_corpus(str(file)).sha256() != before
    assert read_tokens(find_corpus(str(file)), model).tolist() == words_of("the door opens")
    for kept in (tmp_path / "cache" / "llmdpd" / "corpora").iterdir():
        kept.write_bytes(b"broken")
    assert read_tokens(find_corpus(str(file)), model).tolist() == words_of("the door opens")


def test_rows_of_parquet_files_of_the_hub(
    model: LanguageModel, hub: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = hub()
    for name, rows in {
        "test-00000-of-00001": ["again"],
        "train-00000-of-00002": ["", "the puck goes\n", None],
        "train-00001-of-00002": ["to a goal"],
    }.items():
        parquet.write_table(pyarrow.table({"id": range(len(rows)), "text": rows}), folder / f"{name}.parquet")
    found = find_corpus(WIKITEXT)
    assert [file.name for file in found.files] == [f"train-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert read_tokens(found, model).tolist() == words_of("the puck goes to a goal")
    parquet.write_table(pyarrow.table({"words": ["a"]}), found.files[0])
    with pytest.raises(InputError, match="no column of texts") as error:
        read_tokens(found, model)
    assert (error.value.found, error.value.expected) == ("words", "text")
    found.files[0].write_bytes(b"nothing")
    with pytest.raises(InputError, match="broken parquet file"):
        read_tokens(found, model)


def test_without_pyarrow_parquet_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else find(name))
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"llmdpd\[lamo\]"):
        find_corpus(str(tmp_path / "train.parquet"))


def test_of_parts_that_their_names_tell_the_training_part_is_read(tmp_path: Path) -> None:
    for name in ("wiki.test.txt", "wiki.train.txt", "wiki.valid.txt", "restrain.txt"):
        (tmp_path / name).write_text("a")
    assert [file.name for file in find_corpus(str(tmp_path)).files] == ["wiki.train.txt"]


def test_a_corpus_that_is_absent_names_the_command(hub: Callable[[], Path]) -> None:
    command = 'hf download --repo-type dataset Salesforce/wikitext --include "wikitext-103-raw-v1/*"'
    for made in (False, True):
        with pytest.raises(InputError) as error:
            find_corpus(WIKITEXT)
        assert command in str(error.value.hint)
        assert "--method.language-weight 0" in str(error.value.hint)
        assert error.value.field == "method.corpus"
        with pytest.raises(InputError) as error:
            find_corpus(WIKITEXT, "corpus")
        assert error.value.field == "corpus"
        assert "lamo" not in str(error.value.hint)
        if not made:
            hub().rmdir()
    with pytest.raises(InputError, match="no such corpus"):
        find_corpus("no such/file/or id")
    with pytest.raises(InputError):
        find_corpus("")


def test_what_is_no_text_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "text.pdf").write_bytes(b"text")
    for place in (tmp_path / "text.pdf", tmp_path):
        with pytest.raises(InputError, match="no text to learn from"):
            find_corpus(str(place))
    for content, told in ((b"\n \n", "no token"), (b"\xff\xfe\xfa", "UTF-8")):
        (tmp_path / "text.txt").write_bytes(content)
        for field in ("method.corpus", "corpus"):
            with pytest.raises(InputError, match=told) as error:
                read_tokens(find_corpus(str(tmp_path / "text.txt"), field), model)
            assert error.value.field == field


def test_texts_of_parquet_that_are_none_are_one_error(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    bytes_ = pyarrow.py_buffer(b"\xff\xfea")
    offsets = pyarrow.py_buffer(np.array([0, 3], np.int32))
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, bytes_])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="broken parquet file"):
        list(module._rows(tmp_path / "a.parquet", "corpus"))
