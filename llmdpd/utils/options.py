"""What marks a field of a configuration as no option of command lines."""

from __future__ import annotations

from typing import Any

NO_OPTION: Any
"""tyro's own mark. Without tyro there are no command lines, and the configurations of policies are read as ever."""

try:
    import tyro
except ModuleNotFoundError:
    NO_OPTION = "no option"
else:
    NO_OPTION = tyro.conf.Suppress
