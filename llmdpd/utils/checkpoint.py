"""Checkpoints: everything that resuming needs; one complete checkpoint is on disk at every moment.

    RUN/checkpoint/step-00001000/
      networks.safetensors     every network of the learner
      optimizers.safetensors   every optimiser's state
      random.safetensors       torch's generators
      state.json               iteration, sampler position, best score so far, hashes of the run's inputs

A new one is written under a temporary name and renamed; only then is the old one removed. So a kill at any moment, or a
full disk, leaves the last one complete. A resumed run that stops before its next iteration writes the same iteration
again: a kill between its two renames leaves the old one under a temporary name, from which it is restored.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.utils.files import atomic_directory, atomic_write_json, read_json, recover_directory
from llmdpd.utils.tensors import load_tensors, write_tensors

FORMAT = 1
_PREFIX = "step-"


class Checkpointed(Protocol):
    """What a checkpoint holds of a learner."""

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]: ...


def save_checkpoint(folder: Path, learner: Checkpointed, iteration: int, state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of an iteration, then drop older ones.

    Raises:
        InputError: the disk is full or refuses; the older checkpoint is still whole.
    """
    target = folder / f"{_PREFIX}{iteration:08d}"
    try:
        with atomic_directory(target) as temporary:
            networks = {f"{name}/{key}": t for name, m in learner.modules.items() for key, t in m.state_dict().items()}
            write_tensors(temporary / "networks.safetensors", networks)
            write_tensors(temporary / "optimizers.safetensors", _optimizer_tensors(learner))
            write_tensors(temporary / "random.safetensors", _random_tensors())
            atomic_write_json(temporary / "state.json", {"format": FORMAT, "iteration": iteration, **state})
    except OSError as error:
        raise refused_write("the checkpoint", target, folder, error) from error
    for old in _checkpoints(folder):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def refused_write(what: str, path: Path, checkpoints: Path, error: OSError) -> InputError:
    """The error for a write that the disk refused; its hint names the checkpoint to resume from."""
    whole = latest_checkpoint(checkpoints)
    kept = f"the checkpoint {whole} is whole" if whole else "there is no older checkpoint"
    return InputError(
        f"{what} could not be written", path=path, found=str(error), expected="room on the disk",
        hint=f"{kept}; make room, then continue with --resume {checkpoints.parent}",
    )  # fmt: skip


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. One that a kill left under its temporary name is restored."""
    for old in folder.glob(f".{_PREFIX}*.old"):
        recover_directory(folder / old.name.split(".")[1])
    return max(_checkpoints(folder), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        InputError: it is missing, broken, or of another format version.
    """
    state = read_json(checkpoint / "state.json")
    found = state.get("format") if isinstance(state, dict) else state
    if not isinstance(state, dict) or found != FORMAT:
        problem = "a checkpoint of another format version"
        raise InputError(problem, path=checkpoint, field="format", found=found, expected=FORMAT)
    return state


def load_checkpoint(checkpoint: Path, learner: Checkpointed) -> None:
    """Put networks, optimisers and torch's generators back as they were.

    Raises:
        InputError: a file that is missing, broken, or does not fit the learner.
    """
    networks = _read(checkpoint / "networks.safetensors")
    for name, module in learner.modules.items():
        part = {key.removeprefix(f"{name}/"): t for key, t in networks.items() if key.startswith(f"{name}/")}
        load_tensors(module, part, checkpoint / "networks.safetensors")
    stored = _read(checkpoint / "optimizers.safetensors")
    for name, optimizer in learner.optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in stored.items():
            owner, index, field = key.split("/")
            if owner == name:
                state.setdefault(int(index), {})[field] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generators = _read(checkpoint / "random.safetensors")
    torch.set_rng_state(generators["cpu"])
    for device in range(torch.cuda.device_count()):
        if f"cuda{device}" in generators:
            torch.cuda.set_rng_state(generators[f"cuda{device}"], device)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []


def _optimizer_tensors(learner: Checkpointed) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, optimizer in learner.optimizers.items():
        for index, fields in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}/{index}/{field}": tensor for field, tensor in fields.items()}
    return tensors


def _random_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError("a file of the checkpoint is missing", path=path) from None
    except safetensors.SafetensorError as error:
        raise InputError("a file of the checkpoint is broken", path=path, found=str(error)) from None
