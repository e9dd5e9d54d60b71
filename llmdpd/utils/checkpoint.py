"""Checkpoints: everything that resuming needs; one complete checkpoint is on disk at every moment.

    RUN/checkpoint/step-00001000/
      networks.safetensors     every network of the learner
      optimizers.safetensors   every optimiser's state
      random.safetensors       torch's generators
      state.json               iteration, sampler position, best score so far, hashes of the run's inputs, and the
                               SHA-256 of the other files and of itself

A new one is written under a temporary name and renamed; only then is the old one removed. So a kill at any moment, or a
full disk, leaves the last one complete. A resumed run that stops before its next iteration writes the same iteration
again: a kill between its two renames leaves the old one under a temporary name, from which it is restored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError, TrainingDivergedError
from llmdpd.utils import ranks
from llmdpd.utils.files import atomic_directory, atomic_write_json, file_sha256, read_json, recover_directory
from llmdpd.utils.tensors import load_tensors, not_finite, read_tensors, write_tensors

FORMAT = 1
_PREFIX = "step-"
_NETWORKS, _OPTIMIZERS, _RANDOM = (f"{name}.safetensors" for name in ("networks", "optimizers", "random"))


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
            write_tensors(temporary / _NETWORKS, _network_tensors(learner))
            write_tensors(temporary / _OPTIMIZERS, _optimizer_tensors(learner))
            write_tensors(temporary / _RANDOM, _random_tensors())
            sums = {name: file_sha256(temporary / name) for name in (_NETWORKS, _OPTIMIZERS, _RANDOM)}
            whole = {"format": FORMAT, "iteration": iteration, **state, "sha256": sums}
            atomic_write_json(temporary / "state.json", {**whole, "sha256_of_this": _sha256(whole)})
    except OSError as error:
        raise refused_write("the checkpoint", target, folder, error) from error
    drop_others(target)
    return target


def drop_others(checkpoint: Path) -> None:
    """Remove the run's other checkpoints: older ones, which a kill may have left beside it."""
    for other in _checkpoints(checkpoint.parent):
        if other != checkpoint:
            shutil.rmtree(other, ignore_errors=True)


def check_learner(learner: Checkpointed, iteration: int, folder: Path) -> None:
    """Hold that every weight and every optimiser's state is finite, before what is kept is replaced by it.

    Raises:
        TrainingDivergedError: one is not; names it, and the checkpoint in `folder` that is whole.
    """
    for what, tensors in (("weights", _network_tensors(learner)), ("optimiser's state", _optimizer_tensors(learner))):
        name = not_finite(tensors)
        if name is not None:
            raise diverged(f"NaN or Inf in the {what} {name} after iteration {iteration}", folder)


def diverged(what: str, folder: Path) -> TrainingDivergedError:
    """The error of a run that diverged, with the checkpoint that is left in `folder` and what may help."""
    kept = latest_checkpoint(folder)
    return TrainingDivergedError(
        f"{what}; training stopped.\n"
        + (f"  The last good checkpoint is {kept}." if kept else "  There was no checkpoint yet.")
        + "\n  Try a lower learning rate, a bound on gradients (grad-clip 1) or, of policy diffusion, a "
        "smaller eta: --help has them under the method's name."
    )


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
    _check_sums(state, checkpoint)
    return state


def _check_sums(state: dict[str, Any], checkpoint: Path) -> None:
    """Hold the files against their checksums, and `state` against its own. Earlier versions wrote none."""
    own = state.pop("sha256_of_this", None)
    found = {"state.json": _sha256(state)}
    expected = {"state.json": own}
    sums = state.pop("sha256", None)
    if own is None and sums is None:
        return
    expected |= sums if isinstance(sums, dict) else {}
    for name in (_NETWORKS, _OPTIMIZERS, _RANDOM):
        if (checkpoint / name).is_file():
            found[name] = file_sha256(checkpoint / name)
    for name, sha256 in found.items():
        if expected.get(name) != sha256:
            problem = "a file of the checkpoint was altered since it was written"
            hint = "start the run anew, or put the file back from a copy"
            parts = {"field": "SHA-256", "found": sha256, "expected": expected.get(name), "hint": hint}
            raise InputError(problem, path=checkpoint / name, **parts)


def _sha256(state: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(state))  # as it will be read: keys are text
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_networks(checkpoint: Path) -> dict[str, Tensor]:
    """Every network's tensors of a checkpoint, as NETWORK/TENSOR. Raises `InputError` for a missing or broken file."""
    read_state(checkpoint)  # which holds the files against their sums
    return read_tensors(checkpoint / _NETWORKS)


def load_checkpoint(checkpoint: Path, learner: Checkpointed) -> None:
    """Put networks, optimisers and torch's generators back as they were.

    Raises:
        InputError: a file that is missing, broken, or does not fit the learner.
    """
    networks = read_tensors(checkpoint / _NETWORKS)
    for name, module in learner.modules.items():
        part = {key.removeprefix(f"{name}/"): t for key, t in networks.items() if key.startswith(f"{name}/")}
        load_tensors(module, part, checkpoint / _NETWORKS)
    stored = read_tensors(checkpoint / _OPTIMIZERS)
    with fitting(checkpoint / _OPTIMIZERS):
        for name, optimizer in learner.optimizers.items():
            _load_optimizer(optimizer, name, stored)
    generators = read_tensors(checkpoint / _RANDOM)
    with fitting(checkpoint / _RANDOM):
        torch.set_rng_state(generators["cpu"])
        for device in range(torch.cuda.device_count()):
            if f"cuda{device}" in generators:
                torch.cuda.set_rng_state(generators[f"cuda{device}"], device)
        if ranks.rank() and "cuda0" in generators:  # all processes draw what the first one does, each on its own GPU
            torch.cuda.set_rng_state(generators["cuda0"])


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Errors of what is put back in the block, out of the file `path`, are an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"[:200]
        raise InputError("the checkpoint does not fit the run", path=path, found=found) from error


def _load_optimizer(optimizer: torch.optim.Optimizer, name: str, stored: Mapping[str, Tensor]) -> None:
    """Put back the states that are named after it. Raises ValueError for one whose shape is not its weight's."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        owner, index, field = key.split("/")
        if owner != name:
            continue
        shape = weights[int(index)].shape
        expected = torch.Size() if field == "step" else shape
        if tensor.shape != expected:  # torch would take it, and fail or go wrong at the next step
            raise ValueError(f"{key} has shape {list(tensor.shape)}, not {list(expected)}")
        state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []


def _network_tensors(learner: Checkpointed) -> dict[str, Tensor]:
    return {f"{name}/{key}": t for name, module in learner.modules.items() for key, t in module.state_dict().items()}


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
