"""What to say of a child process that did not end well. Imports nothing heavy: `regionspot doctor`
uses it.
"""

from __future__ import annotations

import signal
import subprocess

MAX_MESSAGE = 300


def exit_reason(child: subprocess.CompletedProcess[bytes]) -> str:
    """ "crashed (SIGSEGV)", or "ended with status 3: " and the last line that it wrote to
    stderr.
    """
    if child.returncode < 0:
        return f"crashed ({signal.Signals(-child.returncode).name})"
    last = (child.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    return f"ended with status {child.returncode}: {last[:MAX_MESSAGE]}"
