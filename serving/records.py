"""Servers that run in the background: started detached, found by their records on disk, and
stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regionspot.files import write_atomically
from regionspot.serving.contract import ServingError
from regionspot.serving.ports import Ports
from regionspot.serving.processes import start_ticks
from regionspot.serving.server import EXIT_TIMEOUT_S, POLL_S, READY_TIMEOUT_S, open_log


@dataclass(frozen=True)
class ServerRecord:
    """A server that `regionspot-serve up` started, as a file for `regionspot-serve down`.

    Args:
        pid: Process id of the supervisor.
        started: From `start_ticks`, to recognize a process id that the system has reused.
        ready: Whether the server has answered its first canary.
    """

    pid: int
    started: int
    repository: str
    target: str
    log: str
    ports: Ports = field(default_factory=Ports)
    ready: bool = False

    def write(self, home: Path) -> None:
        write_atomically(self.path(home, self.ports), json.dumps(asdict(self), indent=2).encode())

    def remove(self, home: Path) -> None:
        self.path(home, self.ports).unlink(missing_ok=True)

    @property
    def alive(self) -> bool:
        """Whether the supervisor's process still exists."""
        return start_ticks(self.pid) == self.started

    @staticmethod
    def path(home: Path, ports: Ports) -> Path:
        return home / "running" / f"{ports.grpc}.json"

    @classmethod
    def read_all(cls, home: Path) -> list[ServerRecord]:
        """Returns the records of servers that are alive, and removes those of supervisors that were
        killed.
        """
        records = []
        for path in sorted((home / "running").glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                content: dict[str, Any] = json.loads(path.read_text())
                record = cls(**content | {"ports": Ports(**content["ports"])})
                if record.alive:
                    records.append(record)
                    continue
            path.unlink(missing_ok=True)
        return records


def start_detached(
    repository: str | Path,
    home: Path,
    ports: Ports,
    target: str | None = None,
    log: Path | None = None,
) -> ServerRecord:
    """Runs `regionspot-serve up` in a process that outlives this one, and returns once its server
    answers.

    Args:
        ports: From `Ports.resolved`.

    Raises:
        ServingError: The process ended, with its error message, or the server does not answer in
            time.
    """
    output = home / "logs" / f"{ports.grpc}.up.log"
    with open_log(output, "wb") as file:
        child = subprocess.Popen(
            _up_command(repository, home, ports, target, log),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            message = output.read_text(errors="replace").strip().removeprefix("error: ")
            raise ServingError("UNAVAILABLE", message or "the server did not start")
        for record in ServerRecord.read_all(home):
            if record.pid == child.pid and record.ready:
                return record
        try:
            time.sleep(POLL_S)
        except BaseException:  # interrupted: the caller would not learn of the server
            child.terminate()
            raise
    child.terminate()
    logs = f"{output} and {log or home / 'logs' / f'{ports.grpc}.log'}"
    raise ServingError(
        "TIMEOUT", f"the server did not answer within {READY_TIMEOUT_S:.0f} s; see {logs}"
    )


def _up_command(
    repository: str | Path, home: Path, ports: Ports, target: str | None, log: Path | None
) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "regionspot.cli.main",
        "serve",
        "up",
        "--repository",
        str(repository),
    ]
    command += ["--home", str(home), "--host", ports.host]
    command += [
        "--http-port",
        str(ports.http),
        "--grpc-port",
        str(ports.grpc),
        "--metrics-port",
        str(ports.metrics),
    ]
    for option, value in (("--target", target), ("--log", log)):
        if value is not None:
            command += [option, str(value)]
    return command


@contextlib.contextmanager
def running_server(
    repository: str | Path, home: Path, target: str | None = None
) -> Iterator[ServerRecord]:
    """Runs a supervised server on free ports for the duration of a `with` block."""
    record = start_detached(repository, home.resolve(), Ports(0, 0, 0).resolved(), target)
    try:
        yield record
    finally:
        stop_server(record)


def stop_server(record: ServerRecord, timeout_s: float = EXIT_TIMEOUT_S + 20.0) -> None:
    """Ends a supervisor and its server.

    Raises:
        ServingError: It belongs to another user, or is still alive after `timeout_s`.
    """
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(record.pid, signal.SIGTERM)
        except PermissionError as error:
            raise ServingError(
                "UNAVAILABLE", f"process {record.pid} is another user's: let them stop it"
            ) from error
    deadline = time.monotonic() + timeout_s
    while record.alive:
        if time.monotonic() > deadline:
            raise ServingError(
                "TIMEOUT", f"process {record.pid} does not end: kill it, and look into {record.log}"
            )
        time.sleep(0.1)
