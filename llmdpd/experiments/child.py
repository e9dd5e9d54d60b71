"""`python -m llmdpd.experiments.child PARENT COMMAND…`: become the command, and be stopped when the parent dies.

A killed scheduler passes no signal on: without this its runs would go on, in the way of the next one's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: Sequence[str]) -> None:
    """Does not return: the process becomes the command."""
    parent, *command = arguments
    # Kept through exec. SIGTERM: a run saves and ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit(128 + signal.SIGTERM)  # it died before that
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
