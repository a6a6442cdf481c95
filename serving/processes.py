"""The processes of a Triton server, what they do, and what they keep in shared memory (Linux)."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
STUB = "triton_python_backend_stub"
"""The executable of Triton's Python backend. Each instance of a model is one process."""

_NAME_LENGTH = 15  # Linux truncates names of processes
_INSTANCE = re.compile(r"(?P<model>.+)_\d+_\d+")
"""A stub's argument that names its model's instance: `regionspot_0_0`."""


def stub_processes(server_pid: int) -> list[psutil.Process]:
    """Returns the stubs of a server, also those that died and are defunct until Triton waits for
    them. Reads the parents of all processes of the machine, so do not ask often.
    """
    try:
        children = psutil.Process(server_pid).children()
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _is_stub(child)]


def _is_stub(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name()[:_NAME_LENGTH] == STUB[:_NAME_LENGTH]
    return False  # it has ended


def running_stubs(server_pid: int) -> list[tuple[str, int]]:
    """Returns (model, process id) of each stub that runs."""
    return [
        (model, stub.pid)
        for stub in stub_processes(server_pid)
        if (model := _model_of(stub)) is not None
    ]


def _model_of(stub: psutil.Process) -> str | None:
    """Returns the model that a stub runs; None if it has ended."""
    with contextlib.suppress(psutil.Error):
        for argument in stub.cmdline():
            if instance := _INSTANCE.fullmatch(argument):
                return instance["model"]
    return None


def has_dead_stub(server_pid: int) -> bool:
    """Returns whether a stub died without Triton taking notice."""
    for stub in stub_processes(server_pid):
        with contextlib.suppress(psutil.Error):
            if stub.status() == psutil.STATUS_ZOMBIE:
                return True
    return False


def start_ticks(pid: int) -> int | None:
    """Returns when a process was started, in clock ticks since the system's boot; None if it has
    ended.

    With its process id they identify a process, since the system reuses ids. psutil's `create_time`
    does not: it adds the time of the boot, which moves whenever the clock is set.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # behind the name, which may hold spaces
    return None if state == "Z" else int(fields[18])


def send_signal(pid: int, started: int, number: signal.Signals) -> bool:
    """Sends a signal to a process, and to no other that was given its id meanwhile.

    Args:
        started: From `start_ticks`.

    Returns:
        Whether the process was still there.

    Raises:
        PermissionError: It belongs to another user.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if start_ticks(pid) != started:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def has_ended(pid: int) -> bool:
    """Returns whether a child of this process has ended, without waiting for it: the system does
    not reuse its id, nor that of its process group, until somebody does.
    """
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def cpu_seconds(pids: Iterable[int]) -> float:
    """Returns the processor time that processes have used. One that has ended counts nothing."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


def shared_memory_prefix() -> str:
    """Returns a new prefix for the names of a server's shared-memory segments. It names this
    process as their owner.
    """
    return f"regionspot_{os.getpid()}_{secrets.token_hex(4)}_"


def remove_shared_memory(prefix: str) -> None:
    """Removes the shared-memory segments whose names start with `prefix`."""
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def make_shared_memory_private(prefix: str) -> None:
    """Lets only this user read the segments whose names start with `prefix`: Triton's Python
    backend makes them readable by all, whatever the umask.
    """
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            path.chmod(0o600)


def remove_orphaned_shared_memory() -> None:
    """Removes shared-memory segments whose owner was killed, and leaves all others alone."""
    for path in SHARED_MEMORY.glob("regionspot_*"):
        owner = path.name.split("_")[1]
        if owner.isdecimal() and start_ticks(int(owner)) is None:
            with contextlib.suppress(OSError):
                path.unlink()
