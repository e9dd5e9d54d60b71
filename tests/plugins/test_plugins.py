"""A package outside llmdpd adds a file format, a task suite, a language model and a method by entry points alone."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.config.parse import parse_train
from llmdpd.data import FORMATS, load_dataset
from llmdpd.data.task_data import load_tasks
from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.methods.base import Start
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.spaces import Spaces
from llmdpd.prompts import TEXT_MODELS, LLMEncoder, task_prompt
from llmdpd.prompts.llm import INSTRUCTION
from llmdpd.tasks import SUITES
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest
from llmdpd.tasks.specs import canonical_task, common_spec, task_spec
from llmdpd.utils.registry import Registry

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
REGISTRIES = (FORMATS, SUITES, TEXT_MODELS, METHODS)


def forget() -> None:
    for registry in REGISTRIES:
        registry.__dict__.pop("_points", None)
        registry._loaded.clear()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example package as if it were installed: its folder, with its metadata, is on the import path."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    forget()
    yield
    forget()


def write_csv(path: Path) -> Path:
    path.write_text("0,1,-0.1,1\n-0.1,1,-0.1,2\n-0.2,1,-0.1,3\n")
    return path


@pytest.mark.usefixtures("plugin")
def test_a_file_format(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    dataset = load_dataset(tmp_path)
    assert dataset.tasks == ("point-left",)
    assert dataset.rewards.tolist() == [1, 2, 3]
    assert load_tasks(tmp_path / "a.csv", ("point-left",), goal_visible=True).action_dim == 1
    (tmp_path / "a.csv").rename(tmp_path / "a.tsv")
    with pytest.raises(InputError, match=r"a \.csv file"):
        load_dataset(tmp_path)


@pytest.mark.usefixtures("plugin")
def test_a_task_suite() -> None:
    assert canonical_task("Point-Left") == "point-left"
    assert (task_spec("Point-Left").state_dim, task_spec("Point-Left").family) == (2, "points")
    assert task_prompt("point-left").objective == "move it to the left."
    with pytest.raises(InputError, match="one policy cannot serve"):
        common_spec(["point-left", "push"])
    requests = [EpisodeRequest("Point-Left", seed=seed, max_steps=40) for seed in range(3)]
    with EnvPool(workers=1) as pool:
        results = pool.run(requests, lambda observations, *_: np.full((len(observations), 1), -0.1))
    assert all(result.success and result.length < 40 for result in results)
    assert all(result.final_observation[0] < -1 for result in results)


@pytest.mark.usefixtures("plugin")
def test_a_language_model(tmp_path: Path) -> None:
    encoder = LLMEncoder("hashed", cache_dir=tmp_path)
    embedded = encoder.encode(["push", "pull"])
    assert embedded.shape == (2, encoder.dim)
    expected = TEXT_MODELS["hashed"].open().embed([f"{INSTRUCTION}\npush"])  # type: ignore[call-arg]
    assert torch.equal(embedded[:1], torch.from_numpy(expected))
    assert encoder.identity.model == "hashed"


@pytest.mark.usefixtures("plugin")
def test_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_train(["--method", "margin"]).method.margin == 0.1  # type: ignore[attr-defined]
    config = parse_train(["--method", "margin", "--method.margin", "0.3", "--method.network.hidden-dim", "16"]).method
    assert (config.name, config.margin, config.network.hidden_dim) == ("margin", 0.3, 16)  # type: ignore[attr-defined]
    assert METHODS["margin"].Config is type(config)
    with pytest.raises(InputError, match="out of range"):
        parse_train(["--method", "margin", "--method.margin", "-1"])
    with pytest.raises(SystemExit):
        parse_train(["--method", "margin", "--help"])
    assert "--method.margin" in capsys.readouterr().out


def test_without_the_package_its_names_are_unknown() -> None:
    with pytest.raises(InputError, match="unknown task"):
        canonical_task("point-left")
    for registry, name in zip(REGISTRIES, ("csv", "points", "hashed", "margin"), strict=True):
        assert name not in registry
        with pytest.raises(InputError, match=f"unknown {registry.kind}"):
            registry[name]


def test_an_entry_is_imported_when_it_is_looked_up() -> None:
    registry: Registry[object] = Registry("thing", "llmdpd.no_such_group", {"pi": "math:pi", "none": "no_module:x"})
    assert list(registry) == ["pi", "none"]
    assert registry["pi"] == pytest.approx(3.14159, abs=1e-5)
    registry.register("e", 2.7)
    assert (len(registry), registry["e"], "e" in registry) == (3, 2.7, True)
    with pytest.raises(ModuleNotFoundError):
        registry["none"]
    with pytest.raises(InputError, match="unknown thing") as caught:
        registry["pie"]
    assert "pi" in str(caught.value.hint)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (GUIDES / page).read_text(encoding="utf-8"), re.M | re.S)


def test_the_suite_of_the_guide_is_found_by_worker_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page about adding a suite has a whole package: its module and its entry point."""
    (code,), (entry,) = (blocks("add-task-suite.md", language) for language in ("python", "toml"))
    place = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n([\w-]+) = "((\w+)\.(\w+):\w+)"\n', entry)
    assert place is not None
    group, name, value, package, module = place.groups()
    (tmp_path / package).mkdir()
    (tmp_path / package / f"{module}.py").write_text(code)
    metadata = tmp_path / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    try:
        assert (SUITES[name].name, SUITES[name].tasks) == ("my-suite", ("my-left", "my-right"))
        spec = common_spec(SUITES[name].tasks)
        assert task_prompt("my-right").render().endswith("to the right.")
        requests = [EpisodeRequest(task, seed=5, max_steps=spec.max_steps) for task in SUITES[name].tasks]
        with EnvPool(workers=1) as pool:
            results = pool.run(requests, lambda observations, *_: np.full((len(observations), 1), 0.1))
        assert [result.success for result in results] == [False, True]
        assert [result.final_observation.shape for result in results] == [(spec.state_dim,)] * 2
    finally:
        for loaded in (package, f"{package}.{module}"):
            sys.modules.pop(loaded, None)
        forget()


def test_the_method_of_the_guide_learns() -> None:
    """The page about adding a method has a whole method: it is registered, and its loss falls."""
    code, registration = blocks("add-method.md", "python")
    names: dict[str, Any] = {"__name__": "my_method"}
    sys.modules["my_method"] = types.ModuleType("my_method")  # dataclasses look their module up
    exec(compile(code, "guide", "exec"), names)
    exec(registration.replace("from my_package.my_method import MyMethod\n", ""), names)
    try:
        config = METHODS["my-method"].Config.from_preset(Start(None, None))
        context = replace(config.network.context, text=False, trajectory=False)
        config = replace(config, lr=1e-2, network=replace(config.network, context=context, hidden_dim=16))
        method = METHODS["my-method"](METHODS["my-method"].build_network(Spaces(3, 2, 0), config.network), config, 100)
        states, actions = torch.randn(40, 3), torch.rand(40, 2) * 2 - 1
        ends, clock = torch.zeros(40), torch.zeros(40, dtype=torch.int64)
        batch = PromptedBatch(states, actions, ends, states, ends, None, clock, None, None)
        losses = [float(method.update(batch, iteration)["loss/cloning"]) for iteration in range(100)]
        assert losses[-1] < 0.7 * losses[0]
    finally:
        METHODS._loaded.pop("my-method")
