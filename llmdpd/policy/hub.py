"""The Hugging Face hub: a folder of a repository's commit, and a folder pushed as one.

What is fetched are named files alone, JSON and safetensors: nothing of a repository can run code.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmdpd.errors import InputError
from llmdpd.utils.extras import extra

HUB = "hub:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


class Commit(NamedTuple):
    """A repository, OWNER/NAME, as it was at a commit, 40 hexadecimal digits."""

    repository: str
    commit: str

    def __str__(self) -> str:
        return f"{HUB}{self.repository}@{self.commit}"


class Pushed(NamedTuple):
    """What became of a push.

    folder  what was pushed, or would be
    commit  that of the hub; None where nothing was pushed
    reason  why nothing was pushed
    """

    folder: Path
    commit: Commit | None
    reason: str = ""

    def __str__(self) -> str:
        if self.commit is not None:
            return f"pushed {self.folder} to {self.commit}"
        return f"not pushed, {self.reason}: the folder that would be is {self.folder}"


def check_repository(name: str) -> str:
    """The name itself. Raises `InputError` unless it can be a repository's, OWNER/NAME."""
    with extra("hub"):
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    problem = "" if name.count("/") == 1 else "no OWNER/"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        problem = str(error).splitlines()[0]
    if problem:
        expected = "the id of a repository of the Hugging Face hub, OWNER/NAME"
        raise InputError("no such id", field="repository", found=f"{name!r} ({problem})", expected=expected)
    return name


def fetch(name: str, revision: str | None, files: Sequence[str]) -> tuple[Path, Commit]:
    """The folder of a repository's commit with those of its files that match `files`, and which commit it is.

    The log says the commit, as a warning where no revision was named. What was fetched before is there offline.

    Args:
        name: OWNER/NAME. revision: a commit, a branch or a tag; None for the main branch as it is now.
        files: patterns, as of `fnmatch`.

    Raises:
        InputError: no such repository or revision, or none that can be had now.
    """
    with extra("hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (HFValidationError, OSError, RuntimeError, _transport_error()) as error:
        raise InputError(
            "no such policy",
            path=HUB + name,
            field=None if revision is None else "revision",
            found=("" if revision is None else f"{revision}; ") + _said(error),
            expected="the id of a repository of the Hugging Face hub, OWNER/NAME, and one of its revisions",
        ) from None
    commit = Commit(name, folder.name)  # the client keeps each commit in a folder of its name
    if not _COMMIT.fullmatch(commit.commit):
        raise InputError("the hub named no commit", path=HUB + name, found=commit.commit, expected="40 digits")
    if revision is None:
        _log.warning("%s%s without a revision is now %s; name that to have the same again", HUB, name, commit)
    elif revision != commit.commit:
        _log.info("%s%s@%s is now %s", HUB, name, revision, commit)
    return folder, commit


def push(folder: Path, name: str, *, private: bool, message: str, stale: Sequence[str] = ()) -> Pushed:
    """Push a folder as a commit of a repository, which is made where there is none.

    Offline, without a token, or where the hub cannot be reached, nothing is pushed: `Pushed.reason` says why.

    Args:
        private: whether a repository that is made is its owner's alone; one that is there stays what it is.
        stale: patterns of files that go from the repository unless the folder has them.

    Raises:
        InputError: no such id, or the hub refuses.
    """
    check_repository(name)
    if reason := unreachable():
        return Pushed(folder, None, reason)
    with extra("hub"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi(library_name="llmdpd")
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, delete_patterns=list(stale) or None
        )
    except (HfHubHTTPError, ValueError) as error:
        hint = f"what was to be pushed is in {folder}; later: hf upload {name} {folder}"
        raise InputError("the hub refuses the push", path=HUB + name, found=_said(error), hint=hint) from None
    except (OSError, RuntimeError, _transport_error()) as error:
        return Pushed(folder, None, f"as the hub cannot be reached ({type(error).__name__})")
    return Pushed(folder, Commit(name, done.oid))


def unreachable() -> str:
    """Why nothing can be pushed from here, as far as this machine knows; empty where nothing speaks against it."""
    with extra("hub"):
        from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "as HF_HUB_OFFLINE is set"
    return "" if get_token() else "as there is no token (hf auth login, or HF_TOKEN)"


def _transport_error() -> type[Exception]:
    """What all errors of the client's transport have in common, whichever library that is."""
    with extra("hub"):
        from huggingface_hub.errors import HfHubHTTPError

    kind: type[Exception] = HfHubHTTPError.__mro__[1]
    return kind


def _said(error: Exception) -> str:
    return "the hub said: " + " ".join(str(error).split())[:300]
