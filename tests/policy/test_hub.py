"""Policies of the Hugging Face hub, by its real client against a local server: pushed, pinned, fetched, and refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer, hub_in_use
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results

from llmdpd.errors import InputError
from llmdpd.policy import hub as hub_module
from llmdpd.policy.folder import find_policy
from llmdpd.policy.policy import Policy
from llmdpd.policy.publish import folder_to_write, push_policy, without_places

MakePolicy = Callable[..., Policy]
NAME = "someone/pusher"
EVIL = b"cos\nsystem\n(S'touch %s'\ntR."


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The stand-in, which the client takes for the hub; the test works in its own folder."""
    monkeypatch.chdir(tmp_path)
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        yield server


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(), ignore_metadata_errors=False)


def test_pushed_and_loaded_again(
    hub: HubServer, make_policy: MakePolicy, example: Any, rng: np.random.Generator
) -> None:
    policy = make_policy()
    pushed = policy.push_to_hub(NAME, prompts={"push": "Task: push the puck."})
    assert pushed.commit is not None
    assert NAME in hub.private, "a new repository is private"
    assert str(pushed).endswith(f"hub:{NAME}@{pushed.commit.commit}")
    commit, files = hub.repositories[NAME][-1]
    assert commit == pushed.commit.commit
    assert (
        {*files} - {".gitattributes"}
        == {p.name for p in pushed.folder.iterdir()}
        == {"README.md", "policy.json"} | {f"{stem}.safetensors" for stem in ("model", "critic", "texts")}
    )
    loaded = Policy.load(NAME, revision=commit)
    assert loaded.metadata["hub"] == {"repository": NAME, "commit": commit}
    state = rng.normal(size=(4, 7))
    for one in (policy, loaded):
        one.prompt("Task: push the puck.", example)
    np.testing.assert_array_equal(policy.act(state), loaded.act(state))
    loaded.save(Path("kept"))
    assert Policy.load("kept").metadata["hub"]["commit"] == commit, "kept with the policy"


def test_a_revision_is_pinned_and_told(
    hub: HubServer, make_policy: MakePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (make_policy().push_to_hub(NAME).commit for _ in range(2))
    assert first is not None
    assert second is not None
    assert first != second
    with caplog.at_level(logging.INFO, "llmdpd"):
        assert find_policy(f"hub:{NAME}").commit == second
        assert [(r.levelname, second.commit in r.getMessage()) for r in caplog.records] == [("WARNING", True)]
        caplog.clear()
        assert find_policy(NAME, "main").commit == second
        assert [(r.levelname, second.commit in r.getMessage()) for r in caplog.records] == [("INFO", True)]
        caplog.clear()
        for words, revision in ((f"hub:{NAME}", first.commit), (f"hub:{NAME}@{first.commit}", None)):
            found = find_policy(words, revision)
            assert found.commit == first
            assert found.folder.name == first.commit
        assert caplog.records == []


@pytest.mark.parametrize(
    ("words", "revision", "problem"),
    [
        (f"hub:{NAME}@main", "other", "no single revision"),
        (f"hub:{NAME}@", None, "no single revision"),
        (f"hub:{NAME}", "nowhere", "no such policy"),
        ("hub:someone/absent", None, "no such policy"),
        ("kept", "main", "a folder has no revisions"),
    ],
)
def test_what_is_not_there_is_refused(
    hub: HubServer, make_policy: MakePolicy, words: str, revision: str | None, problem: str
) -> None:
    make_policy().push_to_hub(NAME, Path("kept"))
    with pytest.raises(InputError, match=problem) as refused:
        find_policy(words, revision)
    assert revision is None or revision in str(refused.value)


def test_what_was_fetched_is_there_offline(
    hub: HubServer, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = make_policy().push_to_hub(NAME).commit
    folder = find_policy(f"hub:{NAME}").folder
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_policy(f"hub:{NAME}") == (folder, commit)


@pytest.mark.parametrize("inner", ["", "policy/"])
def test_code_in_a_repository_is_not_even_fetched(
    hub: HubServer, make_policy: MakePolicy, tmp_path: Path, inner: str
) -> None:
    make_policy().save(tmp_path / "own")
    files = {f"{inner}{file.name}": file.read_bytes() for file in (tmp_path / "own").iterdir()}
    evil = EVIL % str(tmp_path / "ran").encode()
    names = ("model.pkl", "pytorch_model.bin", "critic.safetensors.pkl", "policy/texts.pt", "policy/x.pickle")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    scripts = dict.fromkeys(("sitecustomize.py", "policy.py", "policy/policy.py", "__init__.py", "conftest.py"), code)
    hub.commit(NAME, {**files, **scripts, **dict.fromkeys(names, evil)})
    policy = Policy.load(f"hub:{NAME}")
    assert policy.metadata["hub"]["repository"] == NAME
    snapshot = next((tmp_path / "cache").rglob("snapshots/*"))
    assert {str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()} == {*files}
    assert not (tmp_path / "ran").exists()
    for name in ("model.safetensors", "policy.json"):  # a pickle in place of a file that is read
        hub.commit(NAME, {**files, f"{inner}{name}": evil})
        with pytest.raises(InputError, match=re.escape(name)):
            Policy.load(f"hub:{NAME}")
    assert not (tmp_path / "ran").exists()


def test_a_second_push_leaves_nothing_stale(hub: HubServer, make_policy: MakePolicy) -> None:
    make_policy().push_to_hub(NAME)
    old = dict.fromkeys(("prompt_data/old/data.hdf5", "config.json", "results.json", "prompts.json"), b"old")
    hub.commit(NAME, {**hub.repositories[NAME][-1][1], **old, "notes.txt": b"mine"})
    commit = make_policy(critic=False).push_to_hub(NAME).commit
    assert commit is not None
    assert {*hub.repositories[NAME][-1][1]} == {
        *(".gitattributes", "README.md", "policy.json", "model.safetensors", "texts.safetensors", "notes.txt")
    }
    assert Policy.load(NAME, revision=commit.commit).critic is None


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses(hub: HubServer, make_policy: MakePolicy, status: int) -> None:
    hub.refuse = status
    with pytest.raises(InputError, match="the hub refuses the push") as refused:
        make_policy().push_to_hub(NAME)
    assert str(Path("hub") / NAME) in str(refused.value)
    assert (Path("hub") / NAME / "README.md").is_file()


@pytest.mark.parametrize("why", ["offline", "no token", "unreachable", "a folder"])
def test_without_a_hub_the_folder_is_written(
    hub: HubServer, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif why == "no token":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    elif why == "unreachable":
        hub.shutdown()
        hub.server_close()
    target = "./written" if why == "a folder" else NAME
    pushed = make_policy().push_to_hub(target)
    assert pushed.commit is None
    assert pushed.folder == (Path("written") if why == "a folder" else Path("hub") / NAME).resolve()
    assert str(pushed).startswith("not pushed")
    assert hub.requests == []
    assert Policy.load(pushed.folder).method == "llmdpd"
    assert card_of(pushed.folder).data.library_name == "llmdpd"
    make_policy().push_to_hub(target)  # written anew


@pytest.mark.parametrize("target", ["pusher", "a/b/c", "someone/with blanks", "", "someone/--x"])
def test_no_id(hub: HubServer, make_policy: MakePolicy, target: str) -> None:
    with pytest.raises(InputError, match="no such id"):
        make_policy().push_to_hub(target)
    assert hub.requests == []


def test_a_folder_of_others_is_left_alone(hub: HubServer, make_policy: MakePolicy) -> None:
    Path("mine").mkdir()
    (Path("mine") / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="holds something else"):
        make_policy().push_to_hub("./mine")
    assert [p.name for p in Path("mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("own", [".git/HEAD", "notes.txt"])
def test_a_clone_keeps_what_no_push_writes(hub: HubServer, make_policy: MakePolicy, own: str) -> None:
    policy = make_policy()
    clone = policy.push_to_hub("./clone").folder
    (clone / own).parent.mkdir(exist_ok=True)
    (clone / own).write_text("mine")
    with pytest.raises(InputError, match="holds something else") as refused:
        policy.push_to_hub("./clone")
    assert own.split("/")[0] in str(refused.value)
    assert (clone / own).read_text() == "mine"


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("~nobody-of-this-name/x", "no such place"),
        ("./loop", "no such place"),
        (".", "the working directory"),
        ("./file", "no folder can be written"),
        ("./file/x/y", "no folder can be written"),
        ("/", "the working directory"),
    ],
)
def test_no_place_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, problem: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if "file" in place:
        Path("file").touch()
    if "loop" in place:
        Path("loop").symlink_to("loop")
    with pytest.raises(InputError, match=problem):
        folder_to_write(place)


def test_pushed_from_a_folder_named_by_a_string(hub: HubServer, make_policy: MakePolicy, tmp_path: Path) -> None:
    pushed = make_policy().push_to_hub(NAME, "kept")
    assert pushed.folder == (tmp_path / "kept").resolve()
    assert pushed.commit is not None


def test_the_card_of_a_folder_names_a_repository_to_be(hub: HubServer, make_policy: MakePolicy) -> None:
    text = card_of(make_policy().push_to_hub("./written").folder).text
    assert 'Policy.load("OWNER/NAME", revision="COMMIT")' in text
    assert "# written\n" in text


@pytest.mark.parametrize(
    ("source", "said", "base"),
    [
        (f"hub:someone/first@{'a' * 40}", f"hub:someone/first@{'a' * 40}", "someone/first"),
        ("/srv/runs/first", "first", None),
    ],
)
def test_the_card_says_what_a_training_started_from(
    hub: HubServer, make_policy: MakePolicy, source: str, said: str, base: str | None
) -> None:
    policy = make_policy()
    policy.metadata |= {"hub": {"commit": "b" * 40, "repository": "someone/other"}}
    plain = card_of(policy.push_to_hub("./plain").folder)
    assert "and on nothing else" in plain.text
    assert "started from" not in plain.text
    assert "pushed by llmdpd" in plain.text
    assert f"| loaded from | hub:someone/other@{'b' * 40} |" in plain.text
    policy.metadata["init"] = {"source": source, "iterations": 700, "sha256": "c" * 64, "trained_on": ["reach"]}
    further = card_of(policy.push_to_hub("./further").folder)
    assert "nothing else" not in further.text
    assert f"| started from | {said}, 700 iterations, SHA-256 {'c' * 64} |" in further.text
    assert (plain.data.base_model, further.data.base_model) == (None, base)


def test_the_card(hub: HubServer, make_policy: MakePolicy, make_result: Callable[..., Any]) -> None:
    results = [
        make_result(task="a|b", successes=20, episodes=25),
        make_result(task="c", split="unseen", successes=None, returns_mean=3.5, returns_std=0.25),
        make_result(task="d", successes=None, action_error=0.125, action_errors=(0.1, 0.15)),
    ]
    prompts = {"a|b": "push ```the``` puck", "c": "open | shut"}
    make_policy().push_to_hub(NAME, results=results, prompts=prompts, license="apache-2.0")
    card = card_of(Path("hub") / NAME)
    card.validate()
    assert "POST /api/validate-yaml" in hub.requests
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("llmdpd", "apache-2.0")
    assert {"llmdpd", "reinforcement-learning"} <= set(data["tags"])
    name, entries = model_index_to_eval_results(data["model-index"])
    assert name == "pusher"
    found = {(e.dataset_name, e.metric_type): (e.metric_value, e.dataset_split, e.metric_args) for e in entries}
    interval = found["a|b", "success_rate"][2]["confidence_interval_95"]
    assert interval == pytest.approx([0.6087, 0.9114], abs=1e-4)  # Wilson's of 20 of 25
    assert found["a|b", "success_rate"][:2] == (0.8, "seen")
    assert found["c", "mean_return"] == (3.5, "unseen", {"episodes": 25, "standard_deviation": 0.25})
    assert found["d", "action_error"][0] == 0.125
    assert "| a\\|b | seen | 25 | success rate | 0.8 | 0.6087 to 0.9114 |" in card.text
    assert "````text\npush ```the``` puck\n````" in card.text
    assert "The weights: apache-2.0." in card.text
    make_policy().push_to_hub(NAME)
    bare = card_of(Path("hub") / NAME)
    assert bare.data.license == "unknown"
    assert bare.data.eval_results is None
    assert "named no licence" in bare.text


def test_places_of_this_machine_stay_here(
    hub: HubServer, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, own = make_policy(), "/srv/jane doe/models/tiny"
    policy.metadata |= {
        "training_data": "/home/jane doe/data/mine, 6 episodes; clones the expert actions",
        "init": {"source": "/Users/jane doe/first", "iterations": 1, "sha256": "c" * 64, "trained_on": ["a/b"]},
        "llm": {"model": own, "revision": "none", "dtype": "float32"},
        "observation": ["/joint_states/position", "/camera/pose/position"],
        "observation_widths": [3, 4],
        "trained_on": ["/arm/reach"],
    }
    policy.llm = own
    folder = push_policy(policy, "./written", local=[own]).folder
    written = "".join(file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md"))
    assert "mine, 6 episodes" in written
    for part in ("jane", "doe", "/home", "/srv", "/Users"):
        assert part not in written
    told = json.loads((folder / "policy.json").read_text())
    assert (told["llm"], told["metadata"]["llm"]["model"], told["metadata"]["init"]["source"]) == (
        *("tiny", "tiny", "first"),
    )
    for name in ("observation", "observation_widths", "trained_on"):
        assert told["metadata"][name] == policy.metadata[name], "read again, to the letter"
    assert policy.metadata["init"]["source"] == "/Users/jane doe/first", "the policy itself stays as it was"


def test_places_in_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_places("/home/Jane Doe/tasks.toml") == "tasks.toml"
    assert without_places("/home/jane and /Users/jo/x") == "~ and x"
    monkeypatch.setenv("HOME", "/srv/Jane Doe")
    assert without_places("in /srv/Jane Doe/runs/a: /srv/Jane Doe") == "in a: ~"
    names = {"trained_on": ["/a/b"], "file": "/a/b"}
    assert without_places(names) == {"trained_on": ["/a/b"], "file": "b"}
    assert without_places("/home/jane doe/x and ~/y/z", ["/home/jane doe/x"]) == "x and z"
    told = "goal at 1/2, /tmp/a.b: https://arxiv.org/abs/1 and/or minari:D4RL/door/human-v2"
    assert without_places({"a": [told, 1]}) == {"a": [told.replace("/tmp/a.b", "a.b"), 1]}
    assert without_places("/", ["/"]) == "/"


def test_no_commit_is_no_folder(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(InputError, match="named no commit"):
        hub_module.fetch(NAME, None, ["policy.json"])
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
