"""What can be exported and what cannot, of every method and way of acting."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
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
        pytest.skip(f"needs more than sizes: {error}")
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
    with pytest.raises(InputError, match="no critic") as refused:
        export_cpp(policy.with_acting(samples=4), prompts, tmp_path / "out")
    assert refused.value.field == "samples"
    policy.network.double()
    with pytest.raises(InputError, match="float32"):
        export_cpp(policy, prompts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
