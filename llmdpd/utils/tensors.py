"""Tensors in safetensors files: written whole, and loaded into the module that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from llmdpd.errors import InputError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name to a safetensors file.

    Raises:
        OSError: the disk is full or refuses the write.
    """
    # Serialised here and written plainly: a full disk then raises OSError, not an error of the serialiser's own.
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(safetensors.torch.save(whole))


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors into a module, all of them and nothing else; `path` is the file that they came from.

    Raises:
        InputError: a name or a shape that does not fit.
    """
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = tensors.get(name), expected.get(name)
        if have is None or want is None or have.shape != want.shape:
            found, wanted = (None if t is None else list(t.shape) for t in (have, want))
            problem = "a tensor does not fit the configuration"
            raise InputError(problem, path=path, field=name, found=found, expected=wanted)
    module.load_state_dict(tensors)
