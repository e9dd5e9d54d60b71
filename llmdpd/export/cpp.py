"""Export to C++: a folder with one source, its header, the policy and its prompts; it builds without this package."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError
from llmdpd.export.amalgamation import HEADER, SOURCE, amalgamated, sources
from llmdpd.export.container import Kind, fingerprint, packed
from llmdpd.export.contents import Prompt, encoded, exportable, policy_arrays, prompt_arrays
from llmdpd.policy.policy import Policy
from llmdpd.utils.files import atomic_directory, atomic_write_json
from llmdpd.version import __version__

POLICY = "policy.llmdpd"
PROMPTS = "prompts"
DESCRIPTION = "export.json"
_COPIED = (HEADER, "CMakeLists.txt", "example.cpp")


def export_cpp(policy: Policy, prompts: Mapping[str, Prompt], out: Path) -> None:
    """Write a folder that builds to a library with the actions of `policy` under each of these prompts.

    The folder is written whole or not at all; an export that was there is replaced. For the same seed and time step the
    library's noise is the policy's own, and its actions differ by rounding alone.

    Args:
        policy: acting as it is to act. prompts: by the name of their files. out: the folder.

    Raises:
        InputError: a policy, or a way of acting, that cannot be exported; no prompt, or one that the policy cannot
            read; a folder of other files.
    """
    network = exportable(policy)[0]
    check_names(prompts)
    check_replaceable(out)
    read = {name: encoded(policy, prompt) for name, prompt in prompts.items()}
    arrays = policy_arrays(policy, next(iter(read.values())))
    mark = fingerprint(arrays)
    csrc = sources()
    with atomic_directory(out) as folder:
        (folder / SOURCE).write_text(amalgamated(csrc), encoding="utf-8")
        for name in _COPIED:
            shutil.copyfile(csrc / "export" / name, folder / name)
        (folder / POLICY).write_bytes(packed(Kind.POLICY, arrays, mark))
        (folder / PROMPTS).mkdir()
        for name, one in read.items():
            content = packed(Kind.PROMPT, prompt_arrays(network, one), mark)
            (folder / PROMPTS / f"{name}.llmdpd").write_bytes(content)
        atomic_write_json(folder / DESCRIPTION, description(policy, "cpp", prompts))


def description(policy: Policy, to: str, prompts: Mapping[str, Prompt]) -> dict[str, Any]:
    """What an export says of itself, for people: where it is from, its sizes, how it acts."""
    network = policy.network
    return {
        "llmdpd": __version__,
        "to": to,
        "method": policy.method,
        "observation": network.spaces.observed_dim,
        "observation_keys": list(policy.metadata.get("observation", ())),
        "action": network.action_dim,
        "acting": policy.acting.describe(network.config),
        "prompts": list(prompts),
        "trained_on": list(policy.metadata.get("trained_on", ())),
    }


def check_names(prompts: Mapping[str, Prompt]) -> None:
    """Raise `InputError` for names that are no file names, or for none."""
    wrong = [name for name in prompts if not re.fullmatch(r"[\w][\w.-]{0,99}", name)]
    if wrong or not prompts:
        found = repr(wrong[0]) if wrong else "none"
        raise InputError("wrong name of a prompt", field="prompts", found=found, expected="letters, digits, . _ and -")


def check_replaceable(out: Path) -> None:
    """Raise `InputError` for a folder that is no export: it would be replaced."""
    if out.is_dir() and any(out.iterdir()) and not (out / DESCRIPTION).is_file():
        expected = "a new folder, or that of an export"
        raise InputError("a folder of other files", path=out, found=f"no {DESCRIPTION}", expected=expected)
