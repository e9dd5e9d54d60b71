"""Export to C++: a folder with one source, its header, the policy and its prompts; it builds without this package."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from llmdpd.export.amalgamation import HEADER, SOURCE, amalgamated, sources
from llmdpd.export.container import Kind, fingerprint, packed
from llmdpd.export.contents import Prompt, encoded, exportable, policy_arrays, prompt_arrays
from llmdpd.export.folder import check_names, check_replaceable, describe, description
from llmdpd.policy.policy import Policy
from llmdpd.utils.files import atomic_directory

POLICY = "policy.llmdpd"
PROMPTS = "prompts"
_COPIED = (HEADER, "CMakeLists.txt", "example.cpp")


def export_cpp(policy: Policy, prompts: Mapping[str, Prompt], out: Path) -> None:
    """Write a folder that builds to a library with the actions of `policy` under each of these prompts.

    The folder is written whole or not at all; an export that was there is replaced, unless its files were
    altered or others added (but for the folder build). For the same seed and time step the
    library's noise is the policy's own, and its actions differ by rounding alone.

    Args:
        policy: acting as it is to act. prompts: by the name of their files. out: the folder.

    Raises:
        InputError: a policy, or a way of acting, that cannot be exported; no prompt, or one that the policy cannot
            read; a folder of other or altered files.
    """
    exportable(policy)
    check_names(prompts)
    check_replaceable(out)
    read = {name: encoded(policy, prompt) for name, prompt in prompts.items()}
    arrays = policy_arrays(policy, next(iter(read.values())))
    mark = fingerprint(arrays)
    csrc, shown = sources(), any(prompt.trajectory is not None for prompt in prompts.values())
    with atomic_directory(out) as folder:
        (folder / SOURCE).write_text(amalgamated(csrc), encoding="utf-8")
        for name in _COPIED:
            shutil.copyfile(csrc / "export" / name, folder / name)
        (folder / POLICY).write_bytes(packed(Kind.POLICY, arrays, mark))
        (folder / PROMPTS).mkdir()
        for name, prompt in prompts.items():
            content = packed(Kind.PROMPT, prompt_arrays(policy, prompt, read[name]), mark)
            (folder / PROMPTS / f"{name}.llmdpd").write_bytes(content)
        describe(folder, description(policy, "cpp", list(prompts), shown))
