"""Export to ONNX: a file a prompt, checked by onnxruntime against the policy as it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.export.contents import Prompt
from llmdpd.export.folder import description, write_checked
from llmdpd.export.traced import EXAMPLE, Check, Run, Traced, quiet
from llmdpd.policy.policy import Policy
from llmdpd.utils.extras import extra

OPSET = 18


def export_onnx(policy: Policy, prompts: Mapping[str, Prompt], out: Path, *, seeded: bool = False) -> dict[str, Check]:
    """Write a folder with NAME.onnx for each prompt: observations, time steps and noise → actions [B, H, A].

    Inputs are `observation` [B, O], `step` int64 [B], and `noise` [K + 1, B, N, H A] of standard normals, the start's
    first; or, `seeded`, `seed` int64 [B] in its place, of which the same noise comes as in every other backend. Further
    ones are there where the policy needs them: `before` [B, O], the observations one step before (an episode's first
    being its own), and `choice` [B], a standard normal by which one of N samples is taken.

    Returns what each file's check by onnxruntime found.

    Raises:
        InputError: as `export_cpp`; a package that is missing.
    """
    runtime = _needed()

    def write(traced: Traced, file: Path) -> Run:
        _write(traced, file, description(policy, "onnx", [file.stem]))
        return _runner(runtime, file)

    return write_checked(policy, prompts, out, "onnx", ".onnx", write, seeded=seeded)


def _needed() -> Any:
    """The module onnxruntime.

    Raises:
        InputError: it is missing, or another package that the export needs.
    """
    with extra("onnx", "--to onnx"):
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    return onnxruntime


def _write(traced: Traced, file: Path, said: Mapping[str, Any]) -> None:
    inputs = traced.inputs(EXAMPLE)
    batch = traced.batch_dimensions(torch.export.Dim("batch"))
    with quiet():
        program = torch.onnx.export(
            traced.module,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["action"],
            dynamic_shapes=batch,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["llmdpd"] = json.dumps(said)
    program.save(str(file))


def _runner(runtime: Any, file: Path) -> Run:
    """The file as a function of its inputs, on one thread."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
        return found

    return run
