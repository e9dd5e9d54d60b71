"""Everything that is fuzzed, by name."""

from __future__ import annotations

from commands import COMMANDS
from crafted import CRAFTED
from judge import Target
from native_calls import NATIVE
from readers import READERS

TARGETS: dict[str, Target] = {**CRAFTED, **READERS, **COMMANDS, **NATIVE}
