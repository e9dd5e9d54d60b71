"""Diffusion policies for offline reinforcement learning, conditioned on a text prompt and a demonstration.

`fit` trains a policy, `Policy` loads and drives one, `build_info()` tells what was compiled and which backends
can run, and `InputError` is what everything raises that a user can get wrong. They are imported when first used, so
that `import llmdpd` needs neither torch nor an environment.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from llmdpd.version import __version__

if TYPE_CHECKING:
    from llmdpd.errors import InputError
    from llmdpd.ops.build_info import build_info
    from llmdpd.policy.policy import Policy
    from llmdpd.runs.fit import fit

# In a checkout after a plain `pip install .`, Python imports this folder, while the compiled module and the kernels
# are in site-packages. Both places make up the package; this one comes first.
__path__ = pkgutil.extend_path(__path__, __name__)

_HOMES = {
    "InputError": "llmdpd.errors",
    "Policy": "llmdpd.policy.policy",
    "build_info": "llmdpd.ops.build_info",
    "fit": "llmdpd.runs.fit",
}

__all__ = ["InputError", "Policy", "__version__", "build_info", "fit"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
