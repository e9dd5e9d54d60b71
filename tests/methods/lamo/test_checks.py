"""The language model of a run: its sizes, what is checked before anything else, and that a resumed run has the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.cli.train import configuration
from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.experiments.plan import Settings, make_plan
from llmdpd.methods.lamo.checks import check_language, language_facts
from llmdpd.nn.sequence_model import GPT2Sizes
from llmdpd.utils.plain import differences


@pytest.fixture
def copies(tiny_gpt2: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Model and corpus that may be changed."""
    folder = shutil.copytree(tiny_gpt2[0].parent, tmp_path / "language")
    return folder / "gpt2", folder / "corpus.txt"


@pytest.fixture
def config_of(copies: tuple[Path, Path]) -> Callable[..., TrainConfig]:
    model, corpus = copies
    own = ("--agent", "lamo", "--lamo.model", str(model), "--lamo.corpus", str(corpus))
    return lambda *words: configuration([*own, *words])


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_its_sizes_are_the_configurations(
    config_of: Callable[..., TrainConfig], copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    assert config.policy.language == GPT2Sizes(2, 2, 16, 64)
    check_language(config)
    monkeypatch.chdir(copies[0].parent)
    again = config_of("--lamo.model", "gpt2", "--lamo.corpus", "corpus.txt")
    assert again.lamo == config.lamo, "places are made absolute"
    assert configuration(["--agent", "bc"]).lamo.model == "gpt2", "to other methods a folder of that name says nothing"
    with pytest.raises(InputError, match="no such option"):
        config_of("--policy.language.width", "32")
    settings = json.loads((copies[0] / "config.json").read_text())
    (copies[0] / "config.json").write_text(json.dumps({**settings, "n_layer": 3}))
    with pytest.raises(InputError, match="other sizes"):
        check_language(config)


def test_what_it_learns_from_is_told_apart(config_of: Callable[..., TrainConfig], copies: tuple[Path, Path]) -> None:
    config, (model, corpus) = config_of(), copies
    before = language_facts(config)
    assert language_facts(config) == before
    with corpus.open("a") as file:
        file.write("again\n")
    (changed,) = differences(before, language_facts(config))
    assert changed.startswith("corpus: ")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert {line.split(":")[0] for line in differences(before, language_facts(config))} == {"corpus", "revision"}
    assert language_facts(config_of("--lamo.language-weight", "0"))["corpus"] is None


@pytest.mark.usefixtures("empty_hub", "torch_settings")
def test_what_is_absent_is_told_before_anything_is_done(
    config_of: Callable[..., TrainConfig],
    copies: tuple[Path, Path],
    tmp_path: Path,
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, (model, _) = tmp_path / "run", copies
    assert train("--agent", "lamo", "--run-dir", run) == 2
    assert "hf download gpt2" in capsys.readouterr().err
    assert not run.exists()
    assert train("--agent", "lamo", "--lamo.model", model, "--run-dir", run) == 2
    told = capsys.readouterr().err
    assert "--lamo.language-weight 0" in told
    assert "hf download --repo-type dataset Salesforce/wikitext" in told
    assert not run.exists()
    # Without the loss no corpus is asked for.
    check_language(configuration(["--agent", "lamo", "--lamo.model", str(model), "--lamo.language-weight", "0"]))
    with pytest.raises(InputError, match="fewer positions"):
        check_language(config_of("--lamo.language-block", "25"))


@pytest.mark.usefixtures("empty_hub")
def test_an_experiment_is_planned_without_it(tmp_path: Path, copies: tuple[Path, Path]) -> None:
    plan = make_plan(Settings("low-data", out=tmp_path / "out", data_root=tmp_path))
    assert list(plan.skipped) == ["lamo-1", "lamo-10", "lamo"]
    assert "hf download gpt2" in plan.skipped["lamo"]
    shares = {key: cells[0].config.data.fraction for key, cells in plan.cells.items()}
    assert shares == {f"{name}{end}": n for name in ("dt", "lamo") for end, n in (("-1", 0.01), ("-10", 0.1), ("", 1))}
    only, options = ("lamo-1", "lamo"), ("--lamo.model", str(copies[0]), "--lamo.corpus", str(copies[1]))
    plan = make_plan(Settings("low-data", out=tmp_path / "out", data_root=tmp_path, only=only, options=options))
    assert {cell.method for cell in plan.runnable} == set(only)
