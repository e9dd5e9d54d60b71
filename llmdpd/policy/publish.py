"""A policy as the folder that the hub gets: its files, a model card, and what is put beside them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdpd.errors import InputError
from llmdpd.policy.card import UNKNOWN_LICENCE, model_card
from llmdpd.policy.hub import Pushed, check_repository, push
from llmdpd.utils.files import atomic_directory, atomic_write_json, atomic_write_text

if TYPE_CHECKING:
    from llmdpd.evaluation.results import TaskResult
    from llmdpd.policy.policy import Policy

DEMONSTRATIONS = "prompt_data"
_ABSOLUTE = re.compile(r"(?<![\w:/.~-])~?/(?:[^\s/,;:'\"]+/)*([^\s/,;:'\"]+)/?")
_STALE = ("critic.safetensors", f"{DEMONSTRATIONS}/*")
"""What an earlier push may have left that this one has not."""


def push_policy(
    policy: Policy,
    target: str,
    folder: Path | None = None,
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
        documents: JSON files that come with it, by their names.
        private: see `push`.
        local: places of this machine, which the policy's metadata may name (see `without_places`).

    Raises:
        InputError: no such id, a folder that holds something else, or the hub refuses.
    """
    to_folder = is_folder(target)
    name = target if to_folder else check_repository(target)
    place = Path(target).expanduser() if to_folder else folder or Path("hub") / name
    if place.is_dir() and any(place.iterdir()) and not (place / "policy.json").is_file():
        expected = "a new folder, or that of an earlier push"
        raise InputError("a folder that holds something else", path=place, found="no policy.json", expected=expected)
    policy = _without_places(policy, local)
    card = model_card(
        policy,
        place.name if to_folder else name,
        results=results,
        prompts=prompts,
        demonstrations=demonstrations is not None,
        licence=licence,
    )
    with atomic_directory(place) as whole:
        policy.save(whole / "policy")
        for file in (whole / "policy").iterdir():
            file.rename(whole / file.name)
        (whole / "policy").rmdir()
        atomic_write_text(whole / "README.md", str(card))
        for file_name, content in (documents or {}).items():
            atomic_write_json(whole / file_name, content)
        if demonstrations is not None:
            shutil.copytree(demonstrations, whole / DEMONSTRATIONS)
    if to_folder:
        return Pushed(place, None, "as a folder was named")
    message = f"{policy.method}, {policy.metadata.get('iterations', 'unknown')} iterations"
    return push(place, name, private=private, message=message, stale=_STALE)


def is_folder(target: str) -> bool:
    """Whether a target of a push is a folder, not a repository: it begins with ".", "/" or "~"."""
    return target.startswith((".", "/", "~"))


def without_places(content: Any, local: Sequence[str] = ()) -> Any:
    """JSON in which places of this machine, which tell whose it is, are their last part: runs/a for /home/me/runs/a.

    Those of `local` are found whatever they hold, others where they are absolute and without blanks.
    """
    if isinstance(content, Mapping):
        return {name: without_places(value, local) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_places(value, local) for value in content]
    if not isinstance(content, str):
        return content
    for place in sorted(local, key=len, reverse=True):
        if Path(place).name:  # the root would be every slash
            content = content.replace(place, Path(place).name)
    return _ABSOLUTE.sub(r"\1", content)


def _without_places(policy: Policy, local: Sequence[str]) -> Policy:
    kept = {"texts": policy.texts, "metadata": without_places(policy.metadata, local)}
    return type(policy)(
        policy.method, policy.network, policy.critic, policy.acting, llm=without_places(policy.llm, local), **kept
    )
