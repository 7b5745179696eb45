"""Run a command that the kernel ends when its parent ends, even by SIGKILL.

    python -IS tether.py PARENT_PID COMMAND [ARGUMENT ...]

The wish survives exec, so the command needs to know nothing of it. A process of its own rather
than `preexec_fn`, which may deadlock in a parent with gRPC's threads. Standard library only: it
runs without site-packages, to start fast (-S), and isolated, lest `types` be our neighbour (-I).
Elsewhere than on Linux it just runs the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Become `command`. Exits with 1 when the parent has gone already."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the wish was made
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 # no shell: the command comes as a list


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
