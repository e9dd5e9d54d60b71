"""`python -m llmdpd.experiments.child PARENT COMMAND…`: become the command, and be stopped when the parent dies.

A killed scheduler passes no signal on: without this its runs would go on, in the way of the next one's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: Sequence[str]) -> None:
    """Does not return: the process becomes the command."""
    parent, *command = arguments
    # Kept through exec. SIGTERM: a run saves and ends.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit(128 + signal.SIGTERM)  # it died before that
    if sys.platform == "win32":  # where exec would be a new process, and this one's end
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
