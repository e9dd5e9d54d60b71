"""Tensors in safetensors files: written whole, and loaded into the module that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmdpd.errors import InputError
from llmdpd.utils.files import check_regular


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name to a safetensors file.

    Raises:
        OSError: the disk is full or refuses the write.
    """
    # Serialised here and written plainly: a full disk then raises OSError, not an error of the serialiser's own.
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(safetensors.torch.save(whole))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        InputError: no such file, no regular file, broken, or NaN or Inf in a tensor.
    """
    check_regular(path, "a safetensors file")
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # safetensors raises its own, OSError, and torch's of names and sizes that are forged
        found = f"{type(error).__name__}: {error}"[:300]
        raise InputError("a broken file", path=path, found=found, expected="a safetensors file") from None
    check_tensors(tensors, path)
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or Inf; None where all numbers are finite."""
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


def check_tensors(tensors: Mapping[str, Tensor], path: Path | None = None) -> None:
    """Raise `InputError` for a tensor that holds NaN or Inf; `path` is the file that they came from."""
    name = not_finite(tensors)
    if name is not None:
        count = int((~torch.isfinite(tensors[name])).sum())
        found = f"{count} of {tensors[name].numel()} numbers"
        raise InputError("NaN or Inf in a tensor", path=path, field=name, found=found, expected="finite numbers")


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors into a module, all of them and nothing else; `path` is the file that they came from.

    Raises:
        InputError: a name or a shape that does not fit.
    """
    check_fit(module, tensors, path)
    module.load_state_dict(tensors)


class _WithoutMemory(TorchFunctionMode):
    """Puts what is made empty, as layers make their weights, on the meta device, and leaves its values alone.

    Not everything, as by `torch.device("meta")`: for arithmetic there torch imports its compiler, for seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Layers that are made in the block have shapes and no memory, whatever sizes they are of."""
    with _WithoutMemory():
        yield


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `InputError` where names or shapes of tensors, from the file `path`, are not those of a module."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = tensors.get(name), expected.get(name)
        if have is None or want is None or have.shape != want.shape:
            found, wanted = (None if t is None else list(t.shape) for t in (have, want))
            problem = "a tensor does not fit the configuration"
            raise InputError(problem, path=path, field=name, found=found, expected=wanted)
