from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmdpd.errors import InputError
from llmdpd.utils.checkpoint import latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from llmdpd.utils.tensors import read_tensors, write_tensors


class Kill(BaseException):
    """SIGKILL: nothing runs after it."""


@dataclass
class Toy:
    """Two networks and two optimisers of different kinds, one of them without any state yet."""

    width: int = 3
    modules: dict[str, nn.Module] = field(init=False)
    optimizers: dict[str, torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = {"one": nn.Linear(2, self.width), "two": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))}
        self.optimizers = {
            "adam": torch.optim.AdamW(self.modules["one"].parameters(), 0.1, fused=True),
            "sgd": torch.optim.SGD(self.modules["two"].parameters(), 0.1, momentum=0.9),
        }

    def step(self, names: tuple[str, ...] = ("adam", "sgd")) -> None:
        loss = sum(module(torch.randn(4, 2)).square().sum() for module in self.modules.values())
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        for name in names:
            self.optimizers[name].step()

    def flat(self) -> list[torch.Tensor]:
        return [t.detach().clone() for module in self.modules.values() for t in module.state_dict().values()]


@pytest.fixture
def toy(rng: np.random.Generator) -> Toy:
    toy = Toy()
    toy.step(("adam",))
    return toy


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files can't grow beyond `limit` bytes: a write beyond is an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_everything_comes_back_bit_for_bit(toy: Toy, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, toy, 7, {"sampler": {"a": 2**100}, "best_score": None})
    toy.step()
    toy.step()
    after, draws = toy.flat(), torch.rand(5)
    other = Toy()
    for _ in range(3):
        other.step()
    assert path == latest_checkpoint(tmp_path)
    load_checkpoint(path, other)
    state = read_state(path)
    assert (state["iteration"], state["sampler"], state["best_score"]) == (7, {"a": 2**100}, None)
    assert not other.optimizers["sgd"].state_dict()["state"], "an optimiser that had no state has none again"
    other.step()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(other.flat(), after, strict=True))
    assert torch.equal(torch.rand(5), draws)


def test_there_is_one_checkpoint_the_newest(toy: Toy, tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for iteration in (5, 100, 1000):
        save_checkpoint(tmp_path, toy, iteration, {})
        assert [p.name for p in tmp_path.iterdir()] == [f"step-{iteration:08d}"]
    save_checkpoint(tmp_path, toy, 1000, {"again": True})
    (tmp_path / ".step-00002000.abc.tmp").mkdir()  # as after a kill
    path = tmp_path / "step-00001000"
    assert latest_checkpoint(tmp_path) == path
    assert read_state(path) == {"format": 1, "iteration": 1000, "again": True}


def test_a_kill_while_the_same_iteration_is_saved_again_loses_nothing(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run that is stopped before its first step writes the checkpoint that it came from."""
    path = save_checkpoint(tmp_path, toy, 5, {"marks_due": True})
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        real(source, target)
        if str(target).endswith(".old"):
            raise Kill

    with monkeypatch.context() as patch:
        patch.setattr("llmdpd.utils.files.os.replace", killed)
        patch.setattr("llmdpd.utils.files.recover_directory", lambda path: None)
        patch.setattr("llmdpd.utils.files.shutil.rmtree", lambda *arguments, **options: None)
        with pytest.raises(Kill):
            save_checkpoint(tmp_path, toy, 5, {"marks_due": True})
    assert not path.exists()
    assert latest_checkpoint(tmp_path) == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("limit", [0, 100, 400, 1500])
def test_a_full_disk_leaves_the_old_one_whole(toy: Toy, tmp_path: Path, limit: int) -> None:
    path = save_checkpoint(tmp_path, toy, 5, {})
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert limit < max(map(len, before.values()))
    with full_disk(limit), pytest.raises(InputError) as error:
        save_checkpoint(tmp_path, toy, 10, {})
    assert "File too large" in str(error.value)
    assert f"{path} is whole" in str(error.value)
    assert f"--resume {tmp_path.parent}" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    load_checkpoint(path, Toy())
    with full_disk(10), pytest.raises(InputError, match="there is no older checkpoint"):
        save_checkpoint(tmp_path / "first", toy, 10, {})


@pytest.mark.parametrize("name", ["networks", "optimizers", "random"])
@pytest.mark.parametrize("damage", ["missing", "cut off", "empty"])
def test_a_damaged_file_is_named(toy: Toy, tmp_path: Path, name: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, toy, 5, {})
    file = path / f"{name}.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-3] if damage == "cut off" else b"")
    with pytest.raises(InputError) as error:
        load_checkpoint(path, Toy())
    assert error.value.path == str(file)
    assert ("not found" if damage == "missing" else "broken") in error.value.problem


def test_another_network_does_not_fit(toy: Toy, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, toy, 5, {})
    with pytest.raises(InputError) as error:
        load_checkpoint(path, Toy(width=4))
    assert error.value.field == "bias"
    assert (error.value.found, error.value.expected) == ([3], [4])


@pytest.mark.parametrize("content", ['{"format": 2}', "[]", '{"iteration": 3}', "{", None])
def test_state_of_another_format_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(InputError) as error:
        read_state(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_one_flipped_bit_is_refused(toy: Toy, tmp_path: Path, rng: np.random.Generator) -> None:
    """Whichever it is: of the networks, the optimisers, the generators or the position."""
    toy.step()
    path = save_checkpoint(tmp_path, toy, 7, {"sampler": {"position": [1, 2, 3]}, "best_score": 0.5})
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(60):
            bytes_ = bytearray(whole)
            bytes_[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            file.write_bytes(bytes_)
            with pytest.raises(InputError):
                read_state(path)
        file.write_bytes(whole)
    read_state(path)


def test_a_checkpoint_of_before_there_were_checksums(toy: Toy, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, toy, 7, {})
    (path / "state.json").write_text(json.dumps({"format": 1, "iteration": 7}))
    assert read_state(path) == {"format": 1, "iteration": 7}


@pytest.mark.parametrize(
    ("file", "change", "found"),
    [
        (
            "optimizers",
            lambda tensors: {**tensors, "adam/0/exp_avg": torch.zeros(2)},
            r"\[2\], not \[3, 2\]",
        ),
        ("optimizers", lambda tensors: {**tensors, "adam/0/exp_avg": torch.tensor(0.5)}, r"\[\], not \[3, 2\]"),
        ("optimizers", lambda tensors: {**tensors, "adam/0/step": torch.zeros(3, 2)}, r"step has .*\[3, 2\], not \[\]"),
        ("optimizers", lambda tensors: {**tensors, "adam/9/exp_avg": torch.zeros(2)}, "IndexError"),
        ("optimizers", lambda tensors: {**tensors, "adam": torch.zeros(2)}, "ValueError"),
        ("random", lambda tensors: {}, "KeyError: 'cpu'"),
        ("random", lambda tensors: {"cpu": tensors["cpu"][:100]}, "RuntimeError"),
        ("random", lambda tensors: {"cpu": tensors["cpu"].float()}, "TypeError"),
    ],
)
def test_states_that_do_not_fit_are_named(
    toy: Toy, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], dict[str, Any]], found: str
) -> None:
    path = save_checkpoint(tmp_path, toy, 7, {}) / f"{file}.safetensors"
    before = torch.get_rng_state()
    write_tensors(path, change(read_tensors(path)))
    with pytest.raises(InputError, match="the checkpoint does not fit the run") as caught:
        load_checkpoint(path.parent, Toy())
    assert caught.value.path == str(path)
    assert re.search(found, str(caught.value.found))
    torch.set_rng_state(before)
