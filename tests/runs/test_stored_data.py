"""Runs on data in shards: the same batches and weights, bit for bit, as on the same data in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdpd.config.parse import has_field, parse_train, split_options
from llmdpd.config.presets import PRESETS, with_method
from llmdpd.data import columns, load_dataset, save_shards
from llmdpd.evaluation.results import read_results
from llmdpd.methods import METHODS
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.runs import pipeline
from llmdpd.runs.data import training_data
from llmdpd.runs.folder import RunFolder
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.checkpoint import latest_checkpoint

NAMES = [name for name, kind in METHODS.items() if not kind.online]
SMALL = {
    **{"method.network.sequence.context": 4, "method.network.sequence.layers": 1, "method.network.sequence.width": 16},
    **{"method.network.trajectory.horizon": 4, "method.network.trajectory.layers": 1},
    **{"method.network.trajectory.width": 16, "method.network.trajectory.inner": 16},
    **{"method.network.world.horizon": 4, "method.network.world.layers": 1, "method.network.world.width": 16},
    **{"method.members": 2, "method.model-hidden": 16, "method.model-layers": 1, "method.behaviour-hidden": 16},
}
Contents = Callable[[Path], dict[str, Any]]
Train = Callable[..., int]


@pytest.fixture(autouse=True)
def nothing_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small, no column becomes an array by itself."""
    monkeypatch.setattr(columns, "_MOST_AT_ONCE", 0)


@pytest.fixture
def in_shards(data_folder: Path, tmp_path: Path) -> Path:
    """The training data of the tests, a data set a task, which are joined."""
    data = load_dataset(data_folder / "train")
    for task in data.tasks:
        save_shards([data.select_tasks([task])], tmp_path / "train" / task)
    return tmp_path / "train"


def options_of(method: str, words: list[str], lamo: tuple[Path, Path]) -> list[str]:
    sizes = SMALL | dict(zip(("method.model", "method.corpus"), lamo, strict=True))
    sizes |= {"method.eta": 0} if method == "diffusion-bc" else {}
    given = split_options([*words, *(word for name, n in sizes.items() for word in (f"--{name}", str(n)))])
    start = with_method(PRESETS["metaworld"], method)
    return ["--method", method, *(word for o in given if has_field(start, o.field) for word in o.words)]


def prepared(words: list[str], folder: Path) -> tuple[Any, Any]:
    """A run's learner and sampler, as its stages make them."""
    config = parse_train(words)
    with StopSignals() as stop:
        run = pipeline.Run(config, RunFolder(folder), stop)
        for stage in (pipeline.set_up, pipeline.find_start, pipeline.embed):
            stage(run)
        run.dataset = training_data(config.data, config.tasks)[0]
        return pipeline._offline(run)


def tensors_of(batch: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = batch.tensors()
    return found


@pytest.mark.parametrize("method", NAMES)
def test_every_method_gets_the_same_batches_and_statistics(
    method: str,
    tiny_options: list[str],
    tiny_gpt2: tuple[Path, Path],
    in_shards: Path,
    tmp_path: Path,
) -> None:
    """Transitions, prompts by task, windows: all kinds of batches that methods ask for."""
    words = options_of(method, tiny_options, tiny_gpt2)
    memory, shards = (prepared([*words, *more], tmp_path) for more in ([], ["--data.path", str(in_shards)]))
    assert shards[1]._dataset.stored
    assert not memory[1]._dataset.stored
    for own, other in zip(shards[0].policy.state_dict().items(), memory[0].policy.state_dict().items(), strict=True):
        assert own[0] == other[0]
        assert torch.equal(own[1], other[1]), own[0]
    for _ in range(3):
        own, other = (tensors_of(sampler.next()) for _, sampler in (shards, memory))
        assert own.keys() == other.keys()
        for name, tensor in other.items():
            assert (own[name].dtype, own[name].tolist()) == (tensor.dtype, tensor.tolist()), name


def test_a_run_on_shards_is_the_run_in_memory(
    tiny_options: list[str],
    in_shards: Path,
    tmp_path: Path,
    train: Train,
    contents: Contents,
    stopped_and_resumed: Callable[..., None],
) -> None:
    """To its end, where it is resumed in the middle, on a share of the episodes."""
    more = ["--iterations", "20", "--data.fraction", "0.7", "--evaluation", "offline", "--training.select-every", "10"]
    words = [*tiny_options, *more]
    memory, straight, resumed = (tmp_path / name for name in ("memory", "straight", "resumed"))
    assert train("--run-dir", memory, *words) == 0
    words += ["--data.path", str(in_shards)]
    assert train("--run-dir", straight, *words) == 0
    stopped_and_resumed(resumed, words, LLMDPD, 12)
    assert contents(resumed) == contents(straight)
    found = [latest_checkpoint(run / "checkpoint") for run in (memory, straight)]
    assert found[0] is not None
    assert found[1] is not None
    for file in sorted(path.name for path in found[0].glob("*.safetensors")):
        assert (found[0] / file).read_bytes() == (found[1] / file).read_bytes(), file
    judged = [[record.action_errors for record in read_results(run / "results.json")] for run in (memory, straight)]
    assert judged[0] == judged[1]
