"""The policy on disk: what deployment needs, as safetensors and JSON, each file held to its checksum.

policy/
  policy.json            format version, method, spaces, configuration, what it was trained on, the others' SHA-256
  model.safetensors      encoders and denoising network (the EMA of training)
  critic.safetensors     the critics, where there are any
  texts.safetensors      LLM embeddings of the known text prompts, by the SHA-256 of the text
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llmdpd.errors import InputError, located, nearest_names
from llmdpd.policy.hub import HUB, Commit, fetch
from llmdpd.utils.bounds import ACTION_NUMBERS, Bounds
from llmdpd.utils.files import (
    atomic_directory,
    atomic_write_json,
    check_own_folder,
    file_sha256,
    read_json,
    recover_directory,
)
from llmdpd.utils.tensors import read_tensors, write_tensors

FORMAT = 3
DESCRIPTION = "policy.json"
_SPACES = {"state_dim": Bounds(1, 65_536), "action_dim": ACTION_NUMBERS, "embedding_dim": Bounds(0, 65_536)}
_CHECKED_LATER = ("layout", "action_low", "action_high", "lowest", "highest", "remembered")
"""Fields of the spaces that are no sizes: `Spaces` checks them."""
_CRITIC = {"hidden": Bounds(1, 16_384), "sees_prompts": Bounds(0, 1)}
_SHARED = {"format": int, "method": str, "acting": dict, "llm": str, "sha256": dict}
_PARTS: dict[int, dict[str, Any]] = {
    1: {**_SHARED, "sizes": dict, "policy": dict, "facts": dict},
    **{n: {**_SHARED, "spaces": dict, "network": dict, "critic": dict | None, "metadata": dict} for n in (2, FORMAT)},
}
"""The fields of each format's description, and their types."""
_STEMS = {"model", "critic", "texts"}
_REPLACED_AT_MOST = 20
Upgrades = Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]
"""Format → what makes the description of the next one of one of its."""


def text_key(text: str) -> str:
    """The key of a text prompt's stored embedding."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_policy_folder(
    path: Path, description: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write a policy folder, whole or not at all; `tensors` maps a file's stem to its tensors.

    Raises:
        InputError: a folder is there that holds other files than a policy's, such as a run.
    """
    names = {DESCRIPTION, *(f"{stem}.safetensors" for stem in _STEMS)}
    check_own_folder(path, names.__contains__, "a new folder, or one that holds a policy alone")
    with atomic_directory(path) as folder:
        sums = {}
        for stem, content in tensors.items():
            file = folder / f"{stem}.safetensors"
            write_tensors(file, content)
            sums[file.name] = file_sha256(file)
        atomic_write_json(folder / DESCRIPTION, {"format": FORMAT, **description, "sha256": sums})


def read_policy_folder(path: Path, upgrades: Upgrades) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read a policy folder: its description, in this format whatever it is written in, and tensors by file stem.

    Where another process replaces the folder meanwhile (a training run at its checkpoint), the new one is read.

    Raises:
        InputError: not a policy folder, another format version, a description with missing, unknown or wrong fields,
            a missing file, a file altered since it was written, NaN or Inf in a tensor.
    """
    for _ in range(_REPLACED_AT_MOST):
        before = _identity(path)
        try:
            return _read(path, upgrades)
        except (InputError, OSError):
            if before is not None and _identity(path) == before:
                raise
        recover_directory(path)  # waits for the renames of whoever replaces it
    return _read(path, upgrades)


def _identity(path: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino, status.st_ctime_ns
    return None


def _read(path: Path, upgrades: Upgrades) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    file = path / DESCRIPTION
    if not file.is_file():
        raise InputError(
            "not a policy folder", path=path, found=_listing(path), expected=f"a folder with {DESCRIPTION}"
        )
    description = read_json(file)
    found = description.get("format") if isinstance(description, dict) else None
    if type(found) is not int or found not in _PARTS:
        raise InputError(
            "a policy of another format version",
            path=file,
            field="format",
            found=found,
            expected=FORMAT,
            hint="load it with the version of llmdpd that wrote it",
        )
    for number in range(found, FORMAT):
        _check_description(description, file, number)
        with located(path=file):
            description = upgrades[number](description) | {"format": number + 1}
    _check_description(description, file, FORMAT)
    for part, bounds in (("spaces", _SPACES), ("critic", _CRITIC)):
        if description[part] is not None:
            _check_sizes(part, description[part], bounds, file)
    tensors = {}
    for name, expected in description["sha256"].items():
        part = path / name
        if not part.is_file():
            raise InputError(
                "a file of the policy is missing", path=part, found="no such file", expected=f"SHA-256 {expected}"
            )
        found = file_sha256(part)
        if found != expected:
            raise InputError(
                "a file of the policy was altered", path=part, field="SHA-256", found=found, expected=expected
            )
        tensors[part.stem] = read_tensors(part)
    if ("critic" in tensors) != (description["critic"] is not None):
        found, expected = ("a file", "no file") if "critic" in tensors else ("no file", "critic.safetensors")
        problem = "the description and the files disagree"
        raise InputError(problem, path=file, field="critic", found=found, expected=expected)
    return description, tensors


def _check_description(description: dict[str, Any], file: Path, version: int) -> None:
    """Raise `InputError` for fields of the description that are missing, unknown or of another type."""
    parts = _PARTS[version]
    for name in sorted(parts.keys() | description.keys()):
        if name not in parts:
            hint = f"nearest names: {nearest_names(name, parts)}"
            raise InputError("unknown field in the policy's description", path=file, field=name, hint=hint)
        found = description.get(name)
        if name not in description or not isinstance(found, parts[name]):
            kind = type(found).__name__ if name in description else "no such field"
            expected = getattr(parts[name], "__name__", str(parts[name]))
            raise InputError("a field of the policy is wrong", path=file, field=name, found=kind, expected=expected)
    stems = {name.removesuffix(".safetensors") for name in description["sha256"]}
    if not {"model", "texts"} <= stems <= _STEMS:
        found = ", ".join(description["sha256"]) or "none"
        expected = "model.safetensors, texts.safetensors, and critic.safetensors where there are critics"
        raise InputError("other files than a policy's", path=file, field="sha256", found=found, expected=expected)


def _check_sizes(part: str, sizes: dict[str, Any], bounds: Mapping[str, Bounds], file: Path) -> None:
    """Raise `InputError` for sizes that are missing, unknown, no integers or out of bounds."""
    own = {name: found for name, found in sizes.items() if name not in _CHECKED_LATER}
    for name in sorted(bounds.keys() | own.keys()):
        found, field = own.get(name, "no such field"), f"{part}.{name}"
        # Torch takes no bool for a size; what is either of the two may be written as such.
        if name not in bounds or not isinstance(found, int) or (isinstance(found, bool) and bounds[name].high > 1):
            expected = "an integer" if name in bounds else f"one of {', '.join(bounds)}"
            raise InputError("a field of the policy is wrong", path=file, field=field, found=found, expected=expected)
        bounds[name].check(found, field, file)


def on_hub(source: str | os.PathLike[str]) -> bool:
    """Whether a policy is named by its repository on the Hugging Face hub, hub:OWNER/NAME, and not by a path."""
    return os.fspath(source).startswith(HUB)


class Place(NamedTuple):
    """A policy folder, and of which commit of which repository of the hub; None where it is not of the hub."""

    folder: Path
    commit: Commit | None


def resolve_policy(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The policy folder of `find_policy`, by itself."""
    return find_policy(source, revision).folder


def find_policy(source: str | os.PathLike[str], revision: str | None = None) -> Place:
    """A policy folder, a run folder (its `policy/`), or "hub:OWNER/NAME" of either → the policy folder.

    One that another process replaces meanwhile is waited for.

    The network is asked for what is of the Hugging Face hub only: "hub:OWNER/NAME", "hub:OWNER/NAME@REVISION", or
    "OWNER/NAME" with a revision. Of a repository without a revision, the commit that it is at now is told.

    Args:
        revision: of a repository of the hub: a commit, a branch or a tag.

    Raises:
        InputError: no such folder, no repository that can be had, a revision of what is no repository, two revisions.
    """
    words = os.fspath(source)
    if words.startswith(HUB) or (revision is not None and not Path(words).exists()):
        return _fetched(words.removeprefix(HUB), revision)
    if revision is not None:
        hint = f"{HUB}{words} is the repository"
        raise InputError("a folder has no revisions", path=words, field="revision", found=revision, hint=hint)
    path = Path(words)
    for _ in range(_REPLACED_AT_MOST):
        for folder in (path, path / "policy"):
            recover_directory(folder)
        found = _within(path)
        if (found / DESCRIPTION).is_file():
            return Place(found, None)
    if path.is_dir():
        return Place(path, None)
    raise InputError(
        "no such policy",
        path=path,
        found="a file" if path.exists() else "no such folder",
        expected="a policy folder, a run folder, or hub:OWNER/NAME for one on the Hugging Face hub",
    )


def _fetched(name: str, revision: str | None) -> Place:
    """The policy folder of a repository of the Hugging Face hub."""
    name, sign, named = name.partition("@")
    if sign and (not named or revision not in (None, named)):
        found = f"{named or 'nothing'} behind the @" + (f", and {revision}" if revision else "")
        raise InputError("no single revision", field="revision", found=found, expected="a commit, a branch or a tag")
    # By name: of a run's repository not the checkpoints, which are many times the policy, and nothing that is none.
    names = [DESCRIPTION, *(f"{stem}.safetensors" for stem in sorted(_STEMS))]
    folder, commit = fetch(name, named or revision, [*names, *(f"policy/{name}" for name in names)])
    return Place(_within(folder), commit)


def _within(path: Path) -> Path:
    inner = path / "policy"
    return inner if (inner / DESCRIPTION).is_file() and not (path / DESCRIPTION).is_file() else path


def _listing(path: Path) -> str:
    return ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder" if path.is_dir() else "no folder"
