"""Servers that run in the background: started detached, found by their records on disk, and
stopped.
"""

from __future__ import annotations

import contextlib
import json
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
from regionspot.serving.log_file import LogFile
from regionspot.serving.ports import Ports
from regionspot.serving.processes import send_signal, start_ticks
from regionspot.serving.server import (
    DEFAULT_OPTIONS,
    EXIT_TIMEOUT_S,
    POLL_S,
    READY_TIMEOUT_S,
    ServerOptions,
)


@dataclass(frozen=True)
class ServerRecord:
    """A server that `regionspot-serve up` started, as a file for `regionspot-serve down`.

    Args:
        pid: Process id of the supervisor.
        started: From `start_ticks`, to recognize a process id that the system has reused.
        ready: Whether the server has answered its first canary.
        uses: Names of the folders in the server's home that it runs from; None for a server of an
            earlier release, which did not note them.
    """

    pid: int
    started: int
    repository: str
    target: str
    log: str
    ports: Ports = field(default_factory=Ports)
    ready: bool = False
    uses: tuple[str, ...] | None = None

    def write(self, home: Path) -> None:
        path = self.path(home, self.ports)
        write_atomically(path, json.dumps(asdict(self), indent=2).encode())
        path.chmod(0o600)

    def remove(self, home: Path) -> None:
        self.path(home, self.ports).unlink(missing_ok=True)

    @property
    def alive(self) -> bool:
        """Whether the supervisor's process still exists."""
        return start_ticks(self.pid) == self.started

    @staticmethod
    def path(home: Path, ports: Ports) -> Path:
        return home / "running" / f"{ports.key}.json"

    @classmethod
    def read_all(cls, home: Path) -> list[ServerRecord]:
        """Returns the records of servers that are alive, and removes those of supervisors that were
        killed. Those of other users are left out.
        """
        records = []
        for path in sorted((home / "running").glob("*.json")):
            try:
                text = path.read_text()
            except (PermissionError, FileNotFoundError):
                continue
            except (OSError, UnicodeDecodeError):
                text = ""
            with contextlib.suppress(ValueError, TypeError, KeyError):
                content: dict[str, Any] = json.loads(text)
                record = cls(**content | {"ports": Ports(**content["ports"])})
                if record.alive:
                    records.append(record)
                    continue
            path.unlink(missing_ok=True)
        return records


def output_of(home: Path, ports: Ports) -> LogFile:
    """The output of a supervisor in the background."""
    return LogFile(home / "logs" / f"{ports.key}.up.log")


def start_detached(
    repository: str | Path,
    home: Path,
    ports: Ports,
    options: ServerOptions = DEFAULT_OPTIONS,
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
    output = output_of(home, ports)
    with output.open(empty=True) as file:
        child = subprocess.Popen(
            _up_command(repository, home, ports, options, log),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            message = output.path.read_text(errors="replace").strip().removeprefix("error: ")
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
    logs = f"{output.path} and {log or home / 'logs' / f'{ports.key}.log'}"
    raise ServingError(
        "TIMEOUT", f"the server did not answer within {READY_TIMEOUT_S:.0f} s; see {logs}"
    )


def _up_command(
    repository: str | Path, home: Path, ports: Ports, options: ServerOptions, log: Path | None
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
    command += ["--home", str(home), "--host", ports.host, "--grpc-port", str(ports.grpc)]
    command += ["--metrics-port", str(ports.metrics)]
    if ports.http is not None:
        command += ["--http-port", str(ports.http)]
    if not ports.is_local:
        command.append("--allow-remote")
    command += options.up_options()
    if log is not None:
        command += ["--log", str(log)]
    return command


@contextlib.contextmanager
def running_server(
    repository: str | Path, home: Path, options: ServerOptions = DEFAULT_OPTIONS
) -> Iterator[ServerRecord]:
    """Runs a supervised server on free ports, with HTTP, for the duration of a `with` block."""
    record = start_detached(repository, home.resolve(), Ports(0, 0, 0).resolved(), options)
    try:
        yield record
    finally:
        stop_server(record)


def stop_server(record: ServerRecord, timeout_s: float = EXIT_TIMEOUT_S + 20.0) -> None:
    """Ends a supervisor and its server.

    Raises:
        ServingError: It belongs to another user, or is still alive after `timeout_s`.
    """
    try:
        send_signal(record.pid, record.started, signal.SIGTERM)
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
