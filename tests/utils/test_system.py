from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmdpd.utils import system


def test_reading_at_a_place_leaves_the_place(tmp_path: Path, rng: np.random.Generator) -> None:
    content = rng.bytes(100)
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        file.seek(7)
        assert system.read_at(file.fileno(), 20, 90) == content[90:]
        assert system.read_at(file.fileno(), 5, 3) == content[3:8]
        assert file.tell() == 7


def test_a_process_lives_until_it_ends() -> None:
    assert system.is_alive(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert system.is_alive(other.pid)
        other.communicate(b"\n")
    assert not system.is_alive(other.pid)


def test_readers_share_a_file_and_a_writer_has_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with path.open("rb") as one, path.open("rb") as two, path.open("rb") as writer:
        system.lock_shared(one.fileno())
        system.lock_shared(two.fileno())
        with pytest.raises(BlockingIOError):
            system.try_lock(writer.fileno())
        one.close()
        two.close()
        system.try_lock(writer.fileno())
        with path.open("rb") as late, pytest.raises(BlockingIOError):
            system.lock_shared(late.fileno())


def test_a_folder_is_synced_and_its_lock_let_go(tmp_path: Path) -> None:
    system.sync(tmp_path)
    for _ in range(2):  # the second waits for ever where the first is not let go
        descriptor = system.lock_folder(tmp_path)
        assert descriptor is not None
        os.close(descriptor)
