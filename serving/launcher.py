"""Executes the Triton server in its own place, after setting what only the new process can set for
itself. It needs the standard library alone, and is run by its path:

    python -I -S launcher.py PARENT_PID MAX_FILE_BYTES COMMAND ...

Forking a process with gRPC's threads allows no Python between `fork` and `exec`
(`subprocess.Popen(preexec_fn=...)` may deadlock); here there is one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Does not return: the process becomes the command, and ends when its parent does, even by
    SIGKILL. No file that it writes, and no segment of shared memory, grows beyond a limit: writing
    fails, as on a full disk.
    """
    parent, max_file_bytes, command = int(argv[0]), int(argv[1]), argv[2:]
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before it could be told
        sys.exit(1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    if allowed != resource.RLIM_INFINITY:
        max_file_bytes = min(max_file_bytes, allowed)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
