"""A launch as data: one description for the launcher and for compilation ahead of time, so that the two can't drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments by name in order, its constants, and the compiler's options."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None

    def run(self) -> None:
        if self.programs:
            self.kernel[(self.programs,)](*self.arguments.values(), **self.constants, **self._options())

    def _options(self) -> dict[str, Any]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    def compile(self, capability: int) -> Any:
        """The compiled kernel for a device of compute capability 10 x major + minor. Needs no device."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, attributes, constants = {}, {}, dict(self.constants)
        for index, (name, value) in enumerate(self.arguments.items()):
            if isinstance(value, Tensor):
                signature[name] = _TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]  # what the launcher finds of any allocation
            elif value is None:
                signature[name], constants[name] = "constexpr", None
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
        signature |= dict.fromkeys(self.constants, "constexpr")
        names = {name: index for index, name in enumerate(self.kernel.arg_names)}
        fixed = {(names[name],): value for name, value in constants.items()}
        source = ASTSource(self.kernel, {name: signature[name] for name in names}, fixed, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self._options())
