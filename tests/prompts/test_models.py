from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from llmdpd.errors import InputError
from llmdpd.prompts.models import _FRESH_SECONDS, text_model

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of a model (no real one), older than a hash's minimum age."""
    path = tmp_path / "model"
    fill(path)
    return path


def fill(path: Path) -> None:
    path.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (path / name).write_text("{}")


def revision(folder: Path, memo: Path) -> str:
    return text_model(str(folder)).find(memo).revision


def test_minilm_comes_from_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = text_model("minilm").find(tmp_path)
    assert (source.folder / "model.safetensors").is_file()
    assert source.model_id == "minilm"
    assert source.revision.startswith("sha256:")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'llmdpd\[llm\]'"):
        text_model("minilm").find(tmp_path)


@pytest.mark.parametrize(
    ("name", "hub_id", "gated"),
    [
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B", True),
        ("olmo-1b", "allenai/OLMo-1B-hf", False),
        ("someone/some-model", "someone/some-model", False),
        ("gpt2", "gpt2", False),
    ],
)
def test_absent_models_name_the_command_that_fetches_them(
    hub: Path, tmp_path: Path, name: str, hub_id: str, gated: bool
) -> None:
    with pytest.raises(InputError, match=f"hf download {hub_id}") as caught:
        text_model(name).find(tmp_path)
    assert ("hf auth login" in str(caught.value)) == gated
    assert "folder" in str(caught.value)


def put_into_hub(hub: Path, hub_id: str, commit: str) -> Path:
    repository = hub / f"models--{hub_id.replace('/', '--')}"
    fill(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def test_a_fetched_model_is_found_with_its_commit(hub: Path, tmp_path: Path) -> None:
    commit = "ab" * 20
    snapshot = put_into_hub(hub, "allenai/OLMo-1B-hf", commit)
    for name in ("olmo-1b", "allenai/OLMo-1B-hf"):
        source = text_model(name).find(tmp_path)
        assert (source.model_id, source.revision, source.folder) == ("allenai/OLMo-1B-hf", commit, snapshot)
    (snapshot / "model.safetensors").unlink()  # as where the download broke off
    with pytest.raises(InputError, match=r"no model\.safetensors(.|\n)*hf download allenai/OLMo-1B-hf"):
        text_model("olmo-1b").find(tmp_path)
    for name in ("", "/no/such/folder", "a/b/c", "../x", "two words"):
        with pytest.raises(InputError, match=r"no such language model(.|\n)*llama-3-8b"):
            text_model(name).find(tmp_path)


def test_every_file_must_be_there(folder: Path, tmp_path: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(InputError, match=r"no model-2\.safetensors"):
        text_model(str(folder)).find(tmp_path)
    (folder / "model-2.safetensors").touch()
    text_model(str(folder)).find(tmp_path)
    index.write_text("[]")
    with pytest.raises(InputError, match="broken index"):
        text_model(str(folder)).find(tmp_path)
    index.unlink()
    for missing, problem in {
        "model.safetensors": r"but pytorch_model\.bin(.|\n)*safetensors",
        "tokenizer.json": "no tokenizer",
        "config.json": r"no config\.json",
    }.items():
        (folder / missing).rename(folder / ("pytorch_model.bin" if missing == "model.safetensors" else "gone"))
        with pytest.raises(InputError, match=problem) as caught:
            text_model(str(folder)).find(tmp_path)
        assert caught.value.path == str(folder)
        (folder / "model.safetensors").touch()


def test_the_hash_of_a_folder_tells_its_content(folder: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo"
    first = revision(folder, memo)
    assert revision(folder, memo) == first
    fill(tmp_path / "copy")
    assert revision(tmp_path / "copy", tmp_path) == first
    weights = folder / "model.safetensors"
    before = weights.stat()
    weights.write_text("[]")  # of equal length, and the time of change set back, as a careless copy does
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert revision(folder, memo) != first
    weights.write_text("{}")
    assert revision(folder, memo) == first
    (folder / "README.md").write_text("does not matter")
    assert revision(folder, memo) == first
    (folder / "tokenizer_config.json").write_text("matters")
    assert revision(folder, memo) != first


def test_a_remembered_hash_is_not_used_for_other_content(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + _FRESH_SECONDS + 60)
    first = revision(folder, tmp_path / "memo")
    assert (tmp_path / "memo").exists()
    weights = folder / "model.safetensors"
    before = weights.stat()
    while weights.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has ticked
        weights.write_text("[]")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (before.st_size, before.st_ino, before.st_mtime_ns)
    assert revision(folder, tmp_path / "memo") != first


def test_the_hash_is_remembered_once_the_files_are_settled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memo = tmp_path / "memo"
    fresh = revision(folder, memo)
    assert not memo.exists()
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + _FRESH_SECONDS + 1)
    assert revision(folder, memo) == fresh
    (remembered,) = memo.iterdir()
    monkeypatch.setattr("llmdpd.prompts.models.file_sha256", lambda file: pytest.fail(f"{file} was read again"))
    assert revision(folder, memo) == fresh
    monkeypatch.undo()
    remembered.write_text("sha256:nonsense")
    assert revision(folder, memo) == fresh
    remembered.unlink()
    (tmp_path / "file").touch()
    monkeypatch.setattr("time.time", lambda: now + _FRESH_SECONDS + 1)
    assert revision(folder, tmp_path / "file" / "memo") == fresh, "a memo that can't be written costs a warning"
    assert "cannot remember" in caplog.text
