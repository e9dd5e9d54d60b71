"""The policy on disk: whole, checked, and every way in which it can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.policy.folder import read_policy_folder, resolve_policy, text_key, write_policy_folder
from llmdpd.utils.files import recover_directory

DESCRIPTION: dict[str, Any] = {
    "method": "llmdpd",
    "spaces": {"state_dim": 3, "action_dim": 2, "embedding_dim": 7},
    "network": {},
    "critic": None,
    "acting": {},
    "llm": "minilm",
    "metadata": {"trained_on": ["a"]},
}
FORMAT_1: dict[str, Any] = {
    **{"format": 1, "sizes": {}, "policy": {}, "facts": {}},
    **{"spaces": ..., "network": ..., "critic": ..., "metadata": ...},
}
"""What policy.json had in place of some fields; `...`: it had none."""


REFUSED: dict[int, Any] = {}
"""Nothing is to be upgraded."""


@pytest.fixture
def tensors(rng: np.random.Generator) -> dict[str, dict[str, Tensor]]:
    embeddings = torch.randn(3, 7)
    return {
        "model": {"a.weight": torch.randn(4, 3).t(), "b": torch.randn(())},  # not contiguous, and a scalar
        "texts": {text_key(str(i)): embeddings[i] for i in range(3)},  # views of one tensor
    }


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, dict[str, Tensor]]) -> Path:
    write_policy_folder(tmp_path / "policy", DESCRIPTION, tensors)
    return tmp_path / "policy"


def change(folder: Path, **fields: Any) -> None:
    """Write fields of policy.json anew; `...` takes one out."""
    file = folder / "policy.json"
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def test_comes_back_bit_for_bit(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    description, found = read_policy_folder(folder, REFUSED)
    assert {name: description[name] for name in DESCRIPTION} == DESCRIPTION
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "policy.json", "texts.safetensors"]
    assert found.keys() == tensors.keys()
    for stem, content in tensors.items():
        assert found[stem].keys() == content.keys()
        assert all(torch.equal(found[stem][name], tensor) for name, tensor in content.items())


def test_no_texts_and_critics(tmp_path: Path, rng: np.random.Generator) -> None:
    parts = {"model": {"a": torch.randn(2)}, "texts": {}, "critic": {"q": torch.randn(3)}}
    critic = {"hidden": 16, "sees_prompts": True}
    write_policy_folder(tmp_path / "p", DESCRIPTION | {"critic": critic}, parts)
    description, found = read_policy_folder(tmp_path / "p", REFUSED)
    assert description["critic"] == critic
    assert found["texts"] == {}
    assert torch.equal(found["critic"]["q"], parts["critic"]["q"])


def test_texts_are_known_by_their_exact_words() -> None:
    assert text_key("Task: push.") != text_key("Task: push. ")
    assert text_key("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("name", ["model.safetensors", "texts.safetensors"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match="missing") as error:
        read_policy_folder(folder, REFUSED)
    assert error.value.path == str(folder / name)


@pytest.mark.parametrize("position", [0, 100, -1, None])
def test_altered_file(folder: Path, position: int | None) -> None:
    """One bit at a position; None: the last byte is cut off."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    if position is None:
        content.pop()
    else:
        content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="altered") as error:
        read_policy_folder(folder, REFUSED)
    assert error.value.path == str(file)
    assert error.value.found != error.value.expected


# Formats


@pytest.mark.parametrize("version", [0, 4, "1", True, 2.0, [], {}, None, ...])
def test_another_version(folder: Path, version: Any) -> None:
    change(folder, format=version)
    with pytest.raises(InputError, match="another format version") as error:
        read_policy_folder(folder, REFUSED)
    assert (error.value.found, error.value.expected) == (None if version is ... else version, 3)


def test_earlier_formats_are_upgraded_one_by_one_and_then_checked(folder: Path) -> None:
    def first(description: dict[str, Any]) -> dict[str, Any]:
        assert description["format"] == 1
        kept = {name: value for name, value in description.items() if name not in ("sizes", "policy", "facts")}
        return kept | {name: DESCRIPTION[name] for name in ("spaces", "network", "critic", "metadata")}

    def second(description: dict[str, Any]) -> dict[str, Any]:
        assert description["format"] == 2
        return description

    change(folder, **FORMAT_1)
    description, _ = read_policy_folder(folder, {1: first, 2: second})
    assert {name: description[name] for name in DESCRIPTION} == DESCRIPTION
    assert description["format"] == 3
    for wrong in (
        {1: lambda old: first(old) | {"spaces": {}}, 2: second},
        {1: first, 2: lambda old: old | {"spaces": {}}},
    ):
        with pytest.raises(InputError) as error:
            read_policy_folder(folder, wrong)
        assert error.value.field == "spaces.action_dim"
    for name in ("sizes", "policy", "facts"):
        change(folder, **{**FORMAT_1, name: ...})
        with pytest.raises(InputError, match="field of the policy") as error:
            read_policy_folder(folder, REFUSED)
        assert error.value.field == name


# The description


@pytest.mark.parametrize("name", [*DESCRIPTION, "sha256"])
@pytest.mark.parametrize("value", [..., 3])
def test_description_with_a_field_missing_or_of_another_type(folder: Path, name: str, value: Any) -> None:
    change(folder, **{name: value})
    with pytest.raises(InputError, match="field of the policy") as error:
        read_policy_folder(folder, REFUSED)
    assert error.value.field == name
    assert error.value.path == str(folder / "policy.json")


def test_unknown_field(folder: Path) -> None:
    change(folder, actign={})
    with pytest.raises(InputError, match="unknown field") as error:
        read_policy_folder(folder, REFUSED)
    assert error.value.field == "actign"
    assert "acting" in str(error.value.hint)


@pytest.mark.parametrize("names", [{}, {"model.safetensors": "0"}, {"../x": "0"}])
def test_other_files_than_a_policys(folder: Path, names: dict[str, str]) -> None:
    sums = json.loads((folder / "policy.json").read_text())["sha256"] if "../x" in names else {}
    change(folder, sha256=sums | names)
    with pytest.raises(InputError, match="other files") as error:
        read_policy_folder(folder, REFUSED)
    assert error.value.field == "sha256"


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"'])
def test_broken_description(folder: Path, content: str) -> None:
    (folder / "policy.json").write_text(content)
    with pytest.raises(InputError) as error:
        read_policy_folder(folder, REFUSED)
    assert error.value.path == str(folder / "policy.json")


def test_not_a_policy_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hi")
    for path, found in ((tmp_path, "notes.txt"), (tmp_path / "nothing", "no folder")):
        with pytest.raises(InputError, match="not a policy folder") as error:
            read_policy_folder(path, REFUSED)
        assert error.value.found == found


def test_a_write_that_fails_keeps_the_old_policy(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    bad: dict[str, dict[str, Any]] = {"model": tensors["model"], "texts": {"x": "no tensor"}}
    with pytest.raises(AttributeError):
        write_policy_folder(folder, DESCRIPTION, bad)
    _, found = read_policy_folder(folder, REFUSED)
    assert torch.equal(found["model"]["b"], tensors["model"]["b"])
    assert [p.name for p in folder.parent.iterdir()] == ["policy"]


@pytest.mark.parametrize("of_run", [False, True])
def test_between_the_two_renames_of_a_save_the_policy_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, of_run: bool
) -> None:
    """Another process begins to replace the folder right after it was looked whether one had begun."""
    left = [folder.with_name(".policy.0123abcd.old")]

    def recover(path: Path) -> None:
        recover_directory(path)
        if left and path == (folder if of_run else folder / "policy"):
            folder.rename(left.pop())

    monkeypatch.setattr("llmdpd.policy.folder.recover_directory", recover)
    assert resolve_policy(folder.parent if of_run else folder) == folder
    assert not left, "it was replaced meanwhile"
    assert (folder / "policy.json").is_file()


def test_a_run_folder_leads_to_its_policy(folder: Path) -> None:
    assert resolve_policy(folder) == folder
    assert resolve_policy(str(folder.parent)) == folder


OFFLINE = """
import sys
from llmdpd.errors import InputError
from llmdpd.policy.policy import Policy
try:
    Policy.load(sys.argv[1])
except InputError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize(
    "source",
    ["someone/no-such-policy", "nothing here!", "hub:someone/no-such-policy", "hub:no/such/id", "hub:no!"],
)
def test_a_policy_that_cannot_be_had(source: str) -> None:
    """Offline there is no waiting for a network: one clear error."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, source],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "no such policy" in done.stdout
    assert source in done.stdout
    assert ("the hub said" in done.stdout) == source.startswith("hub:")


def test_a_mistyped_path_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(InputError, match="no such policy") as refused:
        resolve_policy("runs/typo")
    assert "hub:OWNER/NAME" in str(refused.value)
