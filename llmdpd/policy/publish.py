"""A policy as the folder that the hub gets: its files, a model card, and what is put beside them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdpd.errors import InputError, abridged
from llmdpd.policy.card import UNKNOWN_LICENCE, model_card
from llmdpd.policy.folder import DESCRIPTION
from llmdpd.policy.hub import Pushed, check_repository, push
from llmdpd.utils.files import atomic_directory, atomic_write_json, atomic_write_text

if TYPE_CHECKING:
    from llmdpd.evaluation.results import TaskResult
    from llmdpd.policy.policy import Policy

DEMONSTRATIONS = "prompt_data"
DOCUMENTS = ("config.json", "results.json", "prompts.json")
"""What a run's push puts beside the policy."""
_CARD = "README.md"
_WEIGHTS = ("model.safetensors", "critic.safetensors", "texts.safetensors")
_WRITTEN = {_CARD, DESCRIPTION, *_WEIGHTS, *DOCUMENTS, DEMONSTRATIONS}
_NAMES = {"task", "trained_on", "seen", "unseen", "observation"}
"""Fields whose words are names, of tasks or of an environment's observations, and never places."""
_HOME = re.compile(r"(?<![\w:/.~-])/(?:home|Users)/(?:[^/\n:;,'\"]*[^/\s:;,'\"](?=/)|[^/\s:;,'\"]+)")
_ABSOLUTE = re.compile(r"(?<![\w:/.~-])~?/(?:[^\s/,;:'\"]+/)*([^\s/,;:'\"]+)/?")
_STALE = ("critic.safetensors", *DOCUMENTS, f"{DEMONSTRATIONS}/*")
"""What an earlier push may have left that this one has not."""


def push_policy(
    policy: Policy,
    target: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    results: Sequence[TaskResult] = (),
    prompts: Mapping[str, str] | None = None,
    demonstrations: Path | None = None,
    documents: Mapping[str, Any] | None = None,
    licence: str = UNKNOWN_LICENCE,
    private: bool = True,
    local: Sequence[str] = (),
) -> Pushed:
    """Write the folder of a policy for the hub, and push it; see `Policy.push_to_hub`.

    Args:
        policy: what is pushed.
        target: OWNER/NAME, or a folder (see `is_folder`), into which it is written and that is all.
        folder: where it is written to be pushed from; by default hub/OWNER/NAME below the working directory.
        results, prompts, licence: see `model_card`.
        demonstrations: a folder of Minari data sets, copied beside the policy.
        documents: JSON files that come with it, by their names, which are of `DOCUMENTS`.
        private: see `push`.
        local: places of this machine, which the policy's metadata may name (see `without_places`).

    Raises:
        InputError: no such id, a folder that is not for this (see `folder_to_write`), or the hub refuses.
    """
    to_folder = is_folder(target)
    name = target if to_folder else check_repository(target)
    place = folder_to_write(target if to_folder else folder or Path("hub") / name)
    policy = _without_places(policy, local)
    card = model_card(
        policy,
        place.name if to_folder else name,
        results=results,
        prompts=prompts,
        demonstrations=demonstrations is not None,
        licence=licence,
    )
    _write(place, policy, str(card), documents or {}, demonstrations)
    if to_folder:
        return Pushed(place, None, "as a folder was named")
    message = f"{policy.method}, {policy.metadata.get('iterations', 'unknown')} iterations"
    return push(place, name, private=private, message=message, stale=_STALE)


def is_folder(target: str) -> bool:
    """Whether a target of a push is a folder, not a repository: it begins with ".", "/" or "~"."""
    return target.startswith((".", "/", "~"))


def folder_to_write(place: str | os.PathLike[str]) -> Path:
    """The absolute path of the folder that a push is written into.

    Raises:
        InputError: a folder with anything that no push writes, as it would be replaced whole; the working directory; a
            file; a place where no folder can be made.
    """
    try:
        path = Path(place).expanduser().resolve()
        if path.is_symlink():  # which Python 3.13 and later leave unresolved
            raise OSError("a loop of links")
        entries = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        above = next((parent for parent in path.parents if parent.exists()), path)
    except (OSError, RuntimeError, ValueError) as error:  # no such user, no right to look, a NUL
        found = getattr(error, "strerror", None) or str(error)
        raise InputError("no such place", path=os.fspath(place), found=found, expected="a folder to write") from None
    expected = "a new folder, or that of an earlier push"
    file = next((each for each in (path, above) if each.exists() and not each.is_dir()), None)
    if file is not None or not os.access(above, os.W_OK):
        found = f"no right to write in {above}" if file is None else f"{file} is a file"
        raise InputError("no folder can be written there", path=path, found=found, expected=expected)
    if path == (here := Path.cwd().resolve()) or path in here.parents:
        raise InputError("the working directory cannot be replaced", path=path, expected=expected)
    foreign = [name for name in entries if name not in _WRITTEN]
    if foreign or (entries and DESCRIPTION not in entries):
        found = abridged(foreign, 5) or f"no {DESCRIPTION}"
        raise InputError("a folder that holds something else", path=path, found=found, expected=expected)
    return path


def _write(place: Path, policy: Policy, card: str, documents: Mapping[str, Any], demonstrations: Path | None) -> None:
    """Write the folder whole, in place of what an earlier push wrote there."""
    with atomic_directory(place) as whole:
        policy.save(whole / "policy")
        for file in (whole / "policy").iterdir():
            file.rename(whole / file.name)
        (whole / "policy").rmdir()
        atomic_write_text(whole / _CARD, card)
        for name, content in documents.items():
            atomic_write_json(whole / name, content)
        if demonstrations is not None:
            shutil.copytree(demonstrations, whole / DEMONSTRATIONS)


def without_places(content: Any, local: Sequence[str] = ()) -> Any:
    """JSON in which places of this machine, which tell whose it is, are their last part: runs/a for /home/me/runs/a.

    Those of `local` are found whatever they hold, others where they are absolute and without blanks, except a user's
    name in /home/NAME. Names of tasks and observations stay, though they may look like places.
    """
    if isinstance(content, Mapping):
        return {name: value if name in _NAMES else without_places(value, local) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_places(value, local) for value in content]
    if not isinstance(content, str):
        return content
    for place in sorted(local, key=len, reverse=True):
        if Path(place).name:  # the root would be every slash
            content = content.replace(place, Path(place).name)
    if Path(home := os.path.expanduser("~")).name:
        content = re.sub(rf"{re.escape(home)}(?![\w-])", "~", content)
    return _ABSOLUTE.sub(r"\1", _HOME.sub("~", content))


def _without_places(policy: Policy, local: Sequence[str]) -> Policy:
    """The policy without places in those of its metadata that name any; the others are read again, to the letter."""
    metadata = dict(policy.metadata)
    metadata |= {name: without_places(metadata[name], local) for name in ("training_data", "llm") if name in metadata}
    if "init" in metadata:
        metadata["init"] = {**metadata["init"], "source": without_places(metadata["init"]["source"], local)}
    llm = without_places(policy.llm, local)
    parts = (policy.method, policy.network, policy.critic, policy.acting)
    return type(policy)(*parts, llm=llm, texts=policy.texts, metadata=metadata)
