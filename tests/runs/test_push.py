"""A run's policy pushed to the hub, by its real client against a local server, and loaded from there."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, HubServer, hub_in_use
from huggingface_hub import ModelCard, snapshot_download

from llmdpd.data import load_dataset
from llmdpd.errors import InputError
from llmdpd.evaluation.results import PromptUse, read_results, write_results
from llmdpd.methods import METHODS
from llmdpd.policy.policy import Policy
from llmdpd.runs.push import push_run

NAME = "someone/metaworld"
Train = Callable[..., int]
Refused = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        yield server


def test_a_run_is_pushed_with_all_that_it_knows(
    hub: HubServer, run_copy: Path, train: Train, capsys: pytest.CaptureFixture[str], data_folder: Path
) -> None:
    assert train("--resume", run_copy, "--push", NAME, "--push-license", "mit") == 0
    commit, files = hub.repositories[NAME][-1]
    assert f"hub:{NAME}@{commit}" in capsys.readouterr().out
    assert json.loads((run_copy / "meta.json").read_text())["hub"] == {"repository": NAME, "commit": commit}
    assert {"README.md", "policy.json", "config.json", "results.json", "prompts.json"} < {*files}
    assert not any(path.startswith("checkpoint") for path in files)
    told = b"".join(data for path, data in files.items() if path.endswith((".json", ".md"))).decode()
    assert str(run_copy) not in told
    assert str(data_folder) not in told
    card = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)
    last = [r for r in read_results(run_copy / "results.json") if r.checkpoint == "last"]
    assert {(e.dataset_name, e.metric_value) for e in card.data.eval_results} == {
        (record.task, record.success_rate) for record in last
    }
    for record in last:
        low, high = record.ci95
        measured = f"success rate | {record.success_rate:.4g} | {low:.4g} to {high:.4g}"
        assert f"| {record.task} | {record.split} | 2 | {measured} |" in card.text
    assert "train, 6 episodes; clones the expert actions" in card.text
    texts = json.loads((run_copy / "prompts.json").read_text())
    assert all(entry["text"].strip() in card.text for entry in texts.values())
    assert {t: e["text"] for t, e in json.loads(files["prompts.json"]).items()} == {
        t: e["text"] for t, e in texts.items()
    }
    # What the card's own lines do: the policy acts from the hub alone as it does from the run.
    folder = snapshot_download(NAME, revision=commit, allow_patterns="prompt_data/*")
    demonstration = load_dataset(f"{folder}/prompt_data", tasks=["push-v3"]).episode(0)
    prompt = {"text": texts["push-v3"]["text"], "trajectory": demonstration}
    own, other = (p.prompt(**prompt) for p in (Policy.load(run_copy), Policy.load(NAME, revision=commit)))
    np.testing.assert_array_equal(own.act(demonstration.observations[0]), other.act(demonstration.observations[0]))


def test_into_a_folder_and_wrong_words(
    hub: HubServer, run_copy: Path, refused: Refused, tmp_path: Path, train: Train
) -> None:
    assert "--push" in refused("--resume", run_copy, "--push", "no id")
    assert "--push-license" in refused("--resume", run_copy, "--push-license", "mit")
    pushed = push_run(run_copy, str(tmp_path / "written"))
    assert pushed.commit is None
    assert hub.repositories == {}
    assert "named no licence" in (tmp_path / "written" / "README.md").read_text()
    (run_copy / "prompts.json").unlink()  # as of an early version
    assert push_run(run_copy, str(tmp_path / "written")).folder == tmp_path / "written"
    (run_copy / "results.json").unlink()
    with pytest.raises(InputError, match=r"results\.json"):
        push_run(run_copy, str(tmp_path / "written"))


def card_results(run: Path, target: Path) -> set[tuple[str, float]]:
    """What the card of a run that is pushed into a folder says was measured: tasks and success rates."""
    folder = push_run(run, str(target)).folder
    card = ModelCard((folder / "README.md").read_text(), ignore_metadata_errors=False)
    return {(entry.dataset_name, entry.metric_value) for entry in card.data.eval_results or ()}


@pytest.mark.parametrize("reads", [{"text": True}, {"trajectory": True}, {}])
def test_results_of_a_policy_that_reads_less(run_copy: Path, tmp_path: Path, reads: dict[str, bool]) -> None:
    policy = Policy.load(run_copy)
    own = {"text": False, "trajectory": False} | reads
    context = dataclasses.replace(policy.network.config.context, **own)
    network = METHODS[policy.method].build_network(
        policy.network.spaces, dataclasses.replace(policy.network.config, context=context)
    )
    Policy(policy.method, network, None, policy.acting, metadata=policy.metadata).save(run_copy / "policy")
    last = [r for r in read_results(run_copy / "results.json") if r.checkpoint == "last"]
    records = [dataclasses.replace(r, prompts=PromptUse(**own)) for r in last]
    other = dataclasses.replace(records[0], prompts=PromptUse(text="swapped: x", trajectory=True), task="other")
    write_results(run_copy / "results.json", [*records, other])
    assert card_results(run_copy, tmp_path / "written") == {(r.task, r.success_rate) for r in last}


def test_results_of_older_weights_are_not_on_the_card(run_copy: Path, tmp_path: Path) -> None:
    assert card_results(run_copy, tmp_path / "written")
    policy = Policy.load(run_copy)
    policy.metadata["iterations"] += 1  # as of a run that was extended, and stopped before it was evaluated
    policy.save(run_copy / "policy")
    assert card_results(run_copy, tmp_path / "written") == set()


def test_places_that_a_configuration_names(run_copy: Path, tmp_path: Path) -> None:
    config = json.loads((run_copy / "config.json").read_text())
    config["tasks"]["file"], config["init"]["source"] = "/srv/Jane Doe/own.toml", "/srv/Jane Doe/first"
    config["llm"] = "/srv/Jane Doe/tiny"
    (run_copy / "config.json").write_text(json.dumps(config))
    told = json.loads((push_run(run_copy, str(tmp_path / "written")).folder / "config.json").read_text())
    assert (told["tasks"]["file"], told["init"]["source"], told["llm"]) == ("own.toml", "first", "tiny")
    assert told["tasks"]["seen"] == config["tasks"]["seen"]


@pytest.mark.parametrize("place", ["mine", "~nobody-of-this-name/x"])
def test_a_folder_is_refused_before_the_training(
    run_copy: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("llmdpd.cli.train.execute", lambda *_: pytest.fail("trained"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    target = place if place.startswith("~") else str(tmp_path / place)
    assert "--push" in refused("--resume", run_copy, "--push", target)


PUSH = """
import os, sys
from llmdpd.runs.push import Path, push_run
print(push_run(Path(sys.argv[1]), sys.argv[2]))
os.environ["HF_TOKEN"] = sys.argv[3]
print(push_run(Path(sys.argv[1]), sys.argv[2]))
"""


def test_by_the_environment_alone(hub: HubServer, run_copy: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN as a user sets them, in a process of its own."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(run_copy), NAME, TOKEN],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    without, pushed = done.stdout.splitlines()
    assert without.startswith("not pushed, as there is no token")
    assert without.endswith(str(run_copy / "hub"))
    assert pushed.endswith(f"hub:{NAME}@{hub.repositories[NAME][-1][0]}")
