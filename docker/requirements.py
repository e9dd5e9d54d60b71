"""Print what extras of this project require, and for `build` what its build does, by pyproject.toml of the working
directory: a container installs that before the source is there, in a layer that a change of the source leaves alone.

    python docker/requirements.py train build
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """The core's requirements and those of extras, of extras within them too, each once.

    Raises:
        SystemExit: an extra within another that holds on some systems alone.
    """
    found = list(project["project"]["dependencies"])
    waiting = list(extras)
    for name in waiting:  # grows as extras within extras are found
        if name == "build":
            # And what scikit-build-core asks for where the system has none.
            found += [*project["build-system"]["requires"], "cmake>=3.18", "ninja>=1.11"]
            continue
        for line in project["project"]["optional-dependencies"][name]:
            within = re.fullmatch(rf"{project['project']['name']}\[([\w,-]+)\](.*)", line)
            if within is None:
                found.append(line)
            elif within[2]:
                raise SystemExit(f"{name} has {line}: name the extras that hold here by themselves")
            else:
                waiting += [extra for extra in within[1].split(",") if extra not in waiting]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(requirements(tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8")), sys.argv[1:])))
