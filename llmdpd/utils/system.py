"""What operating systems do differently: locks of open files, syncing, reading at a place, whether a process lives.

What is here for Windows has been type-checked, and has not been run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import ctypes
    import msvcrt

    # A byte that no file of ours reaches: what lies in a locked range nobody else can read.
    _FAR = 1 << 40
    _QUERY, _STILL_ACTIVE = 0x1000, 259  # PROCESS_QUERY_LIMITED_INFORMATION; winbase.h
    _ACCESS_DENIED = 5  # winerror.h

    def try_lock(descriptor: int) -> None:
        """Lock an open file, for this process alone, until it is closed.

        Raises:
            BlockingIOError: another process has it. OSError: this file system has no locks.
        """
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from None
        finally:
            os.lseek(descriptor, place, os.SEEK_SET)

    def lock_shared(descriptor: int) -> None:
        """Nothing: whoever writes an HDF5 file here keeps it from being opened."""

    def lock_folder(folder: Path) -> int | None:
        """None: folders can't be locked."""
        return None

    def sync(path: Path) -> None:
        """Have a file's content written to the disk; folders can't be asked to."""
        if path.is_file():
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def read_at(descriptor: int, size: int, place: int) -> bytes:
        """Up to `size` bytes of an open file from `place` on; where it stands stays as it is."""
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, place, os.SEEK_SET)
        try:
            return os.read(descriptor, size)
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)

    def is_alive(process: int) -> bool:
        """Whether there is a process of this id. `os.kill` with signal 0 would be its Ctrl-C here."""
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        handle = kernel.OpenProcess(_QUERY, False, process)
        if not handle:
            return ctypes.get_last_error() == _ACCESS_DENIED  # another user's
        code = ctypes.c_ulong()
        kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel.CloseHandle(handle)
        return code.value == _STILL_ACTIVE

    def user() -> str:
        """A name of this user's own."""
        return os.environ.get("USERNAME", "user")

else:
    import fcntl

    def try_lock(descriptor: int) -> None:
        """Lock an open file, for this process alone, until it is closed.

        Raises:
            BlockingIOError: another process has it. OSError: this file system has no locks.
        """
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def lock_shared(descriptor: int) -> None:
        """Keep others from locking an open file, which any number may read. Raises as `try_lock`."""
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def lock_folder(folder: Path) -> int | None:
        """A descriptor of the folder that no other process has locked; who closes it lets it go.

        Without a lock where the file system has none for folders.
        """
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        except BaseException:  # Ctrl-C, while it waits
            os.close(descriptor)
            raise
        return descriptor

    def sync(path: Path) -> None:
        """Have a file's content, or a folder's list, written to the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read_at(descriptor: int, size: int, place: int) -> bytes:
        """Up to `size` bytes of an open file from `place` on; where it stands stays as it is."""
        return os.pread(descriptor, size, place)

    def is_alive(process: int) -> bool:
        """Whether there is a process of this id."""
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):  # another user's
            return True
        return True

    def user() -> str:
        """A name of this user's own."""
        return str(os.getuid())
