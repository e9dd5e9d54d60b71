"""What configurations of several rooms share: the mark of a field that is no option, and kinds of options."""

from __future__ import annotations

from typing import Any, Literal

CudaGraphMode = Literal["auto", "on", "off"]
"""Whether work is captured in CUDA graphs: where it can be (`auto`), or else it is an error (`on`), or never."""
NO_OPTION: Any
"""tyro's own mark. Without tyro there are no command lines, and the configurations of policies are read as ever."""

try:
    import tyro
except ModuleNotFoundError:
    NO_OPTION = "no option"
else:
    NO_OPTION = tyro.conf.Suppress
