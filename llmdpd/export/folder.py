"""What every exported folder has: a description of itself, by which it may be replaced."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError
from llmdpd.export.contents import Prompt, exportable
from llmdpd.export.traced import Check, Run, Traced
from llmdpd.policy.policy import Policy
from llmdpd.utils.files import atomic_directory, atomic_write_json, file_sha256, read_json
from llmdpd.version import __version__

_log = logging.getLogger(__name__)
DESCRIPTION = "export.json"
_BUILT = "build"
"""Folder within an export that is made of it, and may be replaced with it."""


def description(policy: Policy, to: str, prompts: Sequence[str], shown: bool = True) -> dict[str, Any]:
    """What an export says of itself, for people: where it is from, its sizes, how it acts.

    What is exported `to` something else than C++ keeps no state, and acts by the network alone. `shown`: whether any
    prompt has a demonstration, without which there is nothing to track.
    """
    network, acting = policy.network, policy.acting.describe(policy.network.config)
    if acting["track_after"] and to != "cpp":
        words = "the export acts by the network alone: the tracker (track_after %g) is exported to C++ only"
        _log.warning(words, acting["track_after"])
    if not shown or to != "cpp":
        acting["track_after"] = 0.0
    keys = list(policy.metadata.get("observation", ()))
    widths = policy.metadata.get("observation_widths") or [None] * len(keys)
    return {
        "llmdpd": __version__,
        "to": to,
        "method": policy.method,
        "observation": network.spaces.observed_dim,
        "observation_keys": [list(pair) for pair in zip(keys, widths, strict=True)],
        "action": network.action_dim,
        "acting": acting,
        "prompts": list(prompts),
        "trained_on": list(policy.metadata.get("trained_on", ())),
    }


def write_checked(
    policy: Policy,
    prompts: Mapping[str, Prompt],
    out: Path,
    to: str,
    suffix: str,
    write: Callable[[Traced, Path], Run],
    *,
    seeded: bool,
) -> dict[str, Check]:
    """Write a folder with a file for each prompt, whole or not at all, and hold each file to the policy's own actions.

    Args:
        write: writes a traced policy to a file, and gives that back as a function of its inputs.

    Raises:
        InputError: as `export_cpp`; a file that acts otherwise than the policy.
    """
    exportable(policy)
    check_names(prompts)
    check_replaceable(out)
    checks = {}
    with atomic_directory(out) as folder:
        for name, prompt in prompts.items():
            traced = Traced(policy, prompt, seeded)
            checks[name] = traced.check(write(traced, folder / f"{name}{suffix}"))
        checked = {name: asdict(check) for name, check in checks.items()}
        said = description(policy, to, list(prompts)) | {"inputs": traced.described(), "checked": checked}
        describe(folder, said)
    return checks


def check_names(prompts: Mapping[str, Prompt]) -> None:
    """Raise `InputError` for names that are no file names, or for none."""
    wrong = [name for name in prompts if not re.fullmatch(r"[\w][\w.-]{0,99}", name)]
    if wrong or not prompts:
        found = repr(wrong[0]) if wrong else "none"
        raise InputError("wrong name of a prompt", field="prompts", found=found, expected="letters, digits, . _ and -")


def describe(folder: Path, said: Mapping[str, Any]) -> None:
    """Write the description beside all other files, with their SHA-256."""
    files = {name: file_sha256(file) for name, file in _files(folder).items()}
    atomic_write_json(folder / DESCRIPTION, {**said, "files": files})


def check_replaceable(out: Path) -> None:
    """Raise `InputError` for a folder that holds what no export wrote, or was altered since: it would be replaced."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    expected = "a new folder, or that of an export"
    if not (out / DESCRIPTION).is_file():
        raise InputError("a folder of other files", path=out, found=f"no {DESCRIPTION}", expected=expected)
    said = read_json(out / DESCRIPTION)
    written = said.get("files") if isinstance(said, dict) else None
    if not isinstance(written, dict):
        raise InputError("not the description of an export", path=out / DESCRIPTION, field="files", expected=expected)
    for name, file in _files(out).items():
        if name not in written or not file.is_file() or file_sha256(file) != written[name]:
            found = "altered since the export" if name in written else "not of the export"
            hint = "move it away, or name another folder with --out"
            raise InputError("a file that would be lost", path=file, found=found, expected=expected, hint=hint)


def _files(folder: Path) -> dict[str, Path]:
    """All that is in the folder but its folders, its description and what was built of it, by name within."""
    found = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*"))}
    return {
        name: file
        for name, file in found.items()
        if (file.is_symlink() or not file.is_dir()) and name != DESCRIPTION and not name.startswith(f"{_BUILT}/")
    }
