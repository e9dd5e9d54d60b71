"""What can be exported and what cannot, of every method and way of acting."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import make_policy, prompt_of

from llmdpd.errors import InputError
from llmdpd.export.contents import Prompt
from llmdpd.export.cpp import export_cpp
from llmdpd.methods import METHODS
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.policy import Policy

Rng = np.random.Generator
EXPORTED = ("llmdpd", "diffusion-bc", "diffusion-ql")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_exported_or_refused_by_name(name: str, rng: Rng, tmp_path: Path) -> None:
    kind = METHODS[name]
    config = kind.Config()
    try:
        network = kind.build_network(Spaces(6, 2, 5), config.network)
    except InputError as error:
        if "is not installed: pip install" not in str(error):
            raise
        pytest.skip(f"needs a package: {error}")
    acting = dataclasses.replace(config.acting, samples=1) if name in EXPORTED else config.acting
    policy = Policy(name, network, None, acting, texts={})
    prompt = Prompt(trajectory=(rng.normal(size=(9, 6)), rng.uniform(-1, 1, (9, 2))))
    if name in EXPORTED:
        if network.reads.text:
            with pytest.raises(InputError, match="text prompt at every step"):
                export_cpp(policy, {"own": prompt}, tmp_path / "out")
        else:
            export_cpp(policy, {"own": prompt}, tmp_path / "out")
        return
    with pytest.raises(InputError, match="cannot be exported") as refused:
        export_cpp(policy, {"own": prompt}, tmp_path / "out")
    assert refused.value.found == name
    assert all(other in str(refused.value.expected) for other in EXPORTED)
    assert not (tmp_path / "out").exists()


def test_ways_of_acting_are_refused_that_the_file_has_no_place_for(rng: Rng, tmp_path: Path) -> None:
    policy = make_policy()
    prompts = {"push": prompt_of(rng, policy)}
    with pytest.raises(InputError, match="float32") as refused:
        export_cpp(policy.with_acting(precision="bf16"), prompts, tmp_path / "out")
    assert refused.value.field == "precision"
    without = make_policy(acting={"samples": 4})
    without.critic = None
    with pytest.raises(InputError, match="no critic") as refused:
        export_cpp(without, prompts, tmp_path / "out")
    assert refused.value.field == "samples"
    policy.network.double()
    with pytest.raises(InputError, match="float32"):
        export_cpp(policy, prompts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["network", "critic"])
def test_every_part_that_acts_is_float32_and_finite(field: str, rng: Rng, tmp_path: Path) -> None:
    policy = make_policy(acting={"samples": 3})
    prompts, part = {"push": prompt_of(rng, policy)}, getattr(policy, field)
    number = next(iter(part.parameters())).data.view(-1)
    kept, number[0] = float(number[0]), np.nan
    with pytest.raises(InputError, match="NaN or Inf") as refused:
        export_cpp(policy, prompts, tmp_path / "out")
    assert str(refused.value.field).startswith(f"{field}.")
    number[0] = kept
    export_cpp(policy, prompts, tmp_path / "whole")
    part.double()
    with pytest.raises(InputError, match="float32") as refused:
        export_cpp(policy, prompts, tmp_path / "out")
    assert refused.value.field == field
    part.to("meta", torch.float32)
    with pytest.raises(InputError, match="float32") as refused:
        export_cpp(policy, prompts, tmp_path / "out")
    assert (refused.value.field, refused.value.found) == (field, "torch.float32 on meta")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["text", "trajectory"])
def test_a_prompt_is_refused_that_the_policy_does_not_read(kind: str, rng: Rng, tmp_path: Path) -> None:
    policy, whole = make_policy(**{kind: False}), prompt_of(rng, make_policy())
    with pytest.raises(InputError, match=f"without {kind} prompts"):
        export_cpp(policy, {"push": whole}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_cpp(policy, {"push": whole._replace(**{kind: None})}, tmp_path / "out")


def test_prompts_are_refused_that_are_empty_or_have_no_file_name(rng: Rng, tmp_path: Path) -> None:
    policy = make_policy()
    for prompts, words in (
        ({}, "wrong name"),
        ({"a/b": prompt_of(rng, policy)}, "wrong name"),
        ({"..": prompt_of(rng, policy)}, "wrong name"),
        ({"push": Prompt()}, "an empty prompt"),
        ({"push": Prompt(trajectory=(np.zeros((3, 5)), np.zeros((3, 3))))}, "another width"),
    ):
        with pytest.raises(InputError, match=words):
            export_cpp(policy, prompts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_stays(rng: Rng, tmp_path: Path) -> None:
    policy = make_policy()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="a folder of other files"):
        export_cpp(policy, {"push": prompt_of(rng, policy)}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["example.cpp", "prompts/push.llmdpd", "mine.txt", "prompts/mine", "link", "builds/a"])
def test_an_altered_or_added_file_of_an_export_stays(name: str, rng: Rng, tmp_path: Path) -> None:
    policy, out = make_policy(), tmp_path / "out"
    prompts = {"push": prompt_of(rng, policy)}
    export_cpp(policy, prompts, out)
    (out / "build" / "x").mkdir(parents=True)
    (out / "build" / "x" / "example").write_text("built")
    (out / "CMakeLists.txt").unlink()  # one that is missing is written anew
    export_cpp(policy, prompts, out)
    assert (out / "CMakeLists.txt").is_file()
    assert not (out / "build").exists()
    file = out / name
    file.parent.mkdir(exist_ok=True)
    if name == "link":
        file.symlink_to(tmp_path)
    else:
        file.write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in out.rglob("*")}
    with pytest.raises(InputError, match="a file that would be lost") as refused:
        export_cpp(policy, prompts, out)
    assert refused.value.path == str(file)
    assert {path: path.is_file() and path.read_bytes() for path in out.rglob("*")} == before


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"files": []}'])
def test_a_folder_with_another_description_stays(content: str, rng: Rng, tmp_path: Path) -> None:
    policy = make_policy()
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(InputError) as refused:
        export_cpp(policy, {"push": prompt_of(rng, policy)}, tmp_path)
    assert refused.value.path == str(tmp_path / "export.json")
    assert [file.name for file in tmp_path.iterdir()] == ["export.json"]


def test_a_text_that_contradicts_is_folded_in_as_the_policy_heeds_it(
    rng: Rng, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(acting={"contradicted_text": "drop"})
    prompt = prompt_of(rng, policy)

    def written() -> bytes:
        export_cpp(policy, {"push": prompt}, tmp_path / "out")
        return (tmp_path / "out" / "prompts" / "push.llmdpd").read_bytes()

    monkeypatch.setattr("llmdpd.policy.policy.contradicts", lambda *_: False)
    kept = written()
    monkeypatch.setattr("llmdpd.policy.policy.contradicts", lambda *_: True)
    assert written() != kept


@pytest.mark.parametrize("widths", [[4, 3], []])
def test_the_keys_of_dict_observations_are_described(widths: list[int], rng: Rng, tmp_path: Path) -> None:
    policy = make_policy()
    policy.metadata |= {"observation": ["zone", "arm"], "observation_widths": widths}
    export_cpp(policy, {"push": prompt_of(rng, policy)}, tmp_path / "out")
    expected = [["zone", 4], ["arm", 3]] if widths else [["zone", None], ["arm", None]]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["observation_keys"] == expected
