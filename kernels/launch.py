"""A launch as data: one description for the launcher and for compilation ahead of time, so that the two can't drift."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmdpd import kernels

from . import driver

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
_KINDS = {"i32": "i", "i64": "l", "fp32": "f"}


class Wide(int):
    """An integer that a kernel takes in 64 bits, whatever its value."""


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
    members: int = 1
    """The grid's second dimension."""

    def run(self) -> None:
        """Launch it on the current stream of its tensors' device, or interpret it there."""
        if not self.programs:
            return
        if kernels.interpreted():
            values = [int(value) if isinstance(value, Wide) else value for value in self.arguments.values()]
            self.kernel[(self.programs, self.members)](*values, **self.constants, **self.options())
        else:
            place = driver.place_of(next(value for value in self.arguments.values() if isinstance(value, Tensor)))
            self.loaded(place).launch(self.programs, self.members, place.stream, self.values())

    def loaded(self, place: driver.Place) -> Any:
        """The kernel, compiled for these arguments' types and loaded on a device; made once, and kept."""
        types = tuple(map(_type, self.arguments.values()))
        key: Hashable = self.kernel, types, *self.constants.values(), self.warps, self.stages, self.registers
        kinds = "".join("p" if kind[0] == "*" else _KINDS[kind] for kind, _ in types if kind != "none")
        return driver.loaded(key, place, kinds, lambda: self.compile(place.capability))

    def values(self) -> tuple[int | float, ...]:
        """The arguments as the driver takes them: tensors as addresses."""
        found = self.arguments.values()
        return tuple(v.data_ptr() if isinstance(v, Tensor) else v for v in found if v is not None)

    def options(self) -> dict[str, Any]:
        """The compiler's options, as triton calls them."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    def compile(self, capability: int) -> Any:
        """The compiled kernel for a device of compute capability 10 x major + minor. Needs no device."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, attributes, constants = {}, {}, dict(self.constants)
        for index, (name, value) in enumerate(self.arguments.items()):
            kind, aligned = _type(value)
            if value is None:
                signature[name], constants[name] = "constexpr", None
            else:
                signature[name] = kind
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(self.constants, "constexpr")
        names = {name: index for index, name in enumerate(self.kernel.arg_names)}
        fixed = {(names[name],): value for name, value in constants.items()}
        source = ASTSource(self.kernel, {name: signature[name] for name in names}, fixed, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options())


def _type(value: Any) -> tuple[str, bool]:
    """An argument's type in triton's words, and whether it is an address that 16 divides, as any allocation's is."""
    if isinstance(value, Tensor):
        return _TYPES[value.dtype], value.is_meta or value.data_ptr() % 16 == 0
    if value is None:
        return "none", False
    return ("i64" if isinstance(value, Wide) else "i32" if isinstance(value, int) else "fp32"), False
