"""Every reader names what is no regular file: none waits for a pipe, or ends in an error of the system's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.data import is_named
from llmdpd.data.content import read_npz
from llmdpd.data.d4rl import load_d4rl
from llmdpd.data.mtdiff import load_mtdiff
from llmdpd.data.parquet import read_table
from llmdpd.errors import InputError
from llmdpd.reporting.task_picture import is_task_picture
from llmdpd.tasks.texts.text_prompt import TextPrompt
from llmdpd.tasks.user.file import read_task_file
from llmdpd.utils.files import read_text
from llmdpd.utils.tensors import read_tensors

READERS = {
    "read_text": read_text,
    "task file": lambda path: read_task_file(path, is_named),
    "text prompt": TextPrompt.from_file,
    "tensors": read_tensors,
    "HDF5": load_d4rl,
    "parquet": read_table,
    "npz": read_npz,
    "dicts": load_mtdiff,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("how", ["absent", "folder", "pipe", "below a file", "too long"])
def test_what_is_no_regular_file_is_named_by_every_reader(
    tmp_path: Path, read: Callable[[Path], object], how: str
) -> None:
    """Opening a pipe waits for a writer; of a name that is too long, the system says no more than an error."""
    (tmp_path / "file").touch()
    path = tmp_path / {"below a file": "file/x", "too long": "a" * 300}.get(how, how)
    if how in ("folder", "pipe"):
        (os.mkfifo if how == "pipe" else os.mkdir)(path)
    with pytest.raises(InputError, match=r"not found|not a regular file|cannot be") as error:
        read(path)
    assert how == "too long" or error.value.path == str(path)


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not is_task_picture(tmp_path / "pipe")
