"""Export to PyTorch: a program of `torch.export` a prompt, which loads without this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.export.contents import Prompt
from llmdpd.export.folder import write_checked
from llmdpd.export.traced import EXAMPLE, Check, Run, Traced, quiet
from llmdpd.policy.policy import Policy


def export_torch(policy: Policy, prompts: Mapping[str, Prompt], out: Path, *, seeded: bool = False) -> dict[str, Check]:
    """Write a folder with NAME.pt2 for each prompt: `torch.export.load(file).module()` takes what ONNX files take.

    Inputs, by name, and the result are those of `llmdpd.export.onnx.export_onnx`.

    Returns what each file's check found.

    Raises:
        InputError: as `export_cpp`.
    """

    def write(traced: Traced, file: Path) -> Run:
        inputs, batch = traced.inputs(EXAMPLE), traced.batch_dimensions(torch.export.Dim("batch"))
        with quiet():
            program = torch.export.export(traced.module, (), inputs, dynamic_shapes=batch)
            torch.export.save(program, file)
            loaded = torch.export.load(file).module()

        def run(given: Mapping[str, Tensor]) -> NDArray[np.float32]:
            with torch.no_grad():
                found: NDArray[np.float32] = loaded(**given).numpy()
            return found

        return run

    return write_checked(policy, prompts, out, "torch", ".pt2", write, seeded=seeded)
