"""Run a command that is told to stop when whoever started it is gone: ``python -m tgi_ray.tied PARENT COMMAND...``

Not by `preexec_fn`: Python code between fork and exec may hang in a process with as many threads as Ray's have.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it went before it could be asked for
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
