"""Which parts of llmdpd are compiled and can run on this machine; `python -m llmdpd.ops.build_info` prints it."""

from __future__ import annotations

import json
import platform
from typing import Any

from llmdpd.version import __version__


def build_info() -> dict[str, Any]:
    """Version, the C++ module's build, the threads it would use, and which sampler backends can run here.

    Returns:
        `version`, `python`, `torch`; `cpp`: `compiled` and, where it is, `compiler`, `flags`, `instruction_sets`
        compiled in, those `runnable` on this CPU and the one `in_use`; `threads`; `backends`: for `reference`, `cpp`
        and `triton` each `{"available": bool, "reason": str | None}`; the reason says what would help.
    """
    import torch

    from llmdpd.ops import native, triton

    found = {"reference": (True, None), "cpp": native.available(), "triton": triton.availability()}
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpp": _cpp_build(),
        "threads": native.threads(),
        "backends": {name: {"available": can, "reason": why} for name, (can, why) in found.items()},
    }


def _cpp_build() -> dict[str, Any]:
    from llmdpd.ops import native

    if not native.available()[0]:
        return {"compiled": False}
    module = native.module()
    return {
        "compiled": True,
        "compiler": module.compiler,
        "flags": module.flags,
        "instruction_sets": module.compiled_isas(),
        "runnable": module.runnable_isas(),
        "in_use": module.active_isa(),
    }


if __name__ == "__main__":
    print(json.dumps(build_info(), indent=2))
