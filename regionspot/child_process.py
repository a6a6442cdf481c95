"""Runs a module of this package in a process of its own, for work that may crash, hang, or take
memory that must be measured apart. Imports nothing heavy: `regionspot doctor` uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_MESSAGE = 300


@dataclass(frozen=True)
class ModuleRun:
    """What a process printed, and how it ended.

    Args:
        output: its standard output.
        failure: "crashed (SIGSEGV)", "did not end in 60 s", or "ended with status 3: " and the last
            line that it wrote to standard error; None where it ended well.
    """

    output: bytes
    failure: str | None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The whole lines of its output that are JSON objects."""
        lines = self.output.decode(errors="replace").split("\n")[:-1]  # the last may be cut off
        return [json.loads(line) for line in lines if line.startswith("{")]


def run_module(
    module: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> ModuleRun:
    """Runs `python -m MODULE ARGUMENTS`, and waits for its end. When the time is over, or what runs
    this is interrupted, the process and all that it has started are killed.

    Args:
        environment: variables in addition to those of this process.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=variables,
        start_new_session=True,
    ) as child:
        try:
            output, errors = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            _kill(child)
            return ModuleRun(error.stdout or b"", f"did not end in {timeout_s:.0f} s")
        except BaseException:
            _kill(child)
            raise
    failure = _exit_reason(child.returncode, errors) if child.returncode else None
    return ModuleRun(output, failure)


def _kill(leader: subprocess.Popen[bytes]) -> None:
    """A process that leads a session, with the others of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)


def _exit_reason(status: int, errors: bytes) -> str:
    """ "crashed (SIGSEGV)", or "ended with status 3: " and the last line that it wrote to
    stderr.
    """
    if status < 0:
        return f"crashed ({signal.Signals(-status).name})"
    last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    return f"ended with status {status}: {last[:MAX_MESSAGE]}"
