"""Runs a module of this package in a process of its own, for work that may crash, hang, or take
memory that must be measured apart. Imports nothing heavy: `regionspot doctor` uses it.
"""

from __future__ import annotations

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
        """The lines of its output that are JSON objects."""
        lines = self.output.decode(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def run_module(
    module: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> ModuleRun:
    """Runs `python -m MODULE ARGUMENTS`, and waits for its end.

    Args:
        environment: variables in addition to those of this process.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    try:
        child = subprocess.run(command, capture_output=True, env=variables, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        return ModuleRun(error.stdout or b"", f"did not end in {timeout_s:.0f} s")
    return ModuleRun(child.stdout, _exit_reason(child) if child.returncode else None)


def _exit_reason(child: subprocess.CompletedProcess[bytes]) -> str:
    """ "crashed (SIGSEGV)", or "ended with status 3: " and the last line that it wrote to
    stderr.
    """
    if child.returncode < 0:
        return f"crashed ({signal.Signals(-child.returncode).name})"
    last = (child.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    return f"ended with status {child.returncode}: {last[:MAX_MESSAGE]}"
