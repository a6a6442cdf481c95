"""A Triton server as a child process: started, watched, mended and stopped, with nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from regionspot.errors import ArtifactError, InputError, RegionSpotError
from regionspot.files import why_not_written, write_atomically
from regionspot.serving import canary
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import MODEL, ServingError
from regionspot.serving.environment import Installation
from regionspot.serving.model_config import read_config
from regionspot.serving.plain_paths import PlainPaths
from regionspot.serving.repository import models_of, targets_of
from regionspot.serving.triton import STUB_DIED, Connection

SHARED_MEMORY = Path("/dev/shm")
EXIT_TIMEOUT_S = 10
READY_TIMEOUT_S = 600.0
"""Large models are read, checked and compiled when the canary first asks for them."""

POLL_S = 0.5
DEAD_STUB_S = 5.0
STUB = "triton_python_backend_stub"
CANARY_PERIOD_S, CANARY_TIMEOUT_S = 10.0, 30.0
HANG_S = 600.0
"""A server that answers nobody for so long, the canary waiting, is started anew."""

MAX_MENDED, MENDED_WITHIN_S = 10, 300.0
CONNECTION_AGE_MS, CONNECTION_GRACE_MS = 300_000, 120_000
"""Clients look a name's addresses up again when a connection ends: there may be more servers by then."""

METRICS_PORT = 8002
ADMIN_APIS = "model-repository,shared-memory,trace,logging"
LOG_LINES = 12
_PR_SET_PDEATHSIG = 1
_NOISE = re.compile(r"[|+]|I\d{4} |[\s;]*$|At:|\s+\S+\(\d+\): \S+$")
"""Lines of Triton's log that give no reason: tables, what goes well, frames of Python."""

_INSTANCE = re.compile(r"(.+)_\d+_\d+")


@dataclass(frozen=True)
class Ports:
    """Where a server listens. A port of 0 is a free one, chosen by `resolved`; metrics None is 8002 or a free one."""

    http: int = 8000
    grpc: int = 8001
    metrics: int | None = None
    host: str = "127.0.0.1"

    def resolved(self) -> Ports:
        """With free ports in place of zeros.

        Raises:
            InputError: one is taken, or two are the same.
        """
        chosen: dict[str, int] = {}
        with contextlib.ExitStack() as held:
            for name, port in (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics)):
                held_socket = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                held_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    _bind(held_socket, self.host, port)
                except (OSError, OverflowError) as error:
                    raise InputError(
                        f"port {port} cannot be used for {name} ({error}): another server may listen there, "
                        f"`regionspot-serve down` stops ours; or choose one with --{name}-port"
                    ) from error
                chosen[name] = held_socket.getsockname()[1]
        return Ports(**chosen, host=self.host)

    @property
    def grpc_url(self) -> str:
        return f"{_reachable(self.host)}:{self.grpc}"

    @property
    def http_url(self) -> str:
        return f"http://{_reachable(self.host)}:{self.http}"

    @property
    def metrics_url(self) -> str:
        return f"http://{_reachable(self.host)}:{self.metrics}/metrics"


class TritonServer:
    """One server process over a repository. Use as a context manager, or call `stop`.

    Args:
        repository: from `regionspot-serve init`.
        target: one that it was made for; None takes its only one.
        ports: resolved.
        log: where the server's output goes; None leaves it on this process's own.

    Raises:
        ArtifactError: no repository, or none of that target.
    """

    def __init__(
        self,
        installation: Installation,
        repository: str | Path,
        ports: Ports,
        log: Path | None,
        target: str | None = None,
    ) -> None:
        self.installation, self.repository, self.ports, self.log = installation, Path(repository), ports, log
        self.target = choose_target(repository, target)
        self.models = models_of(repository, self.target)
        self._python_models = [name for name in self.models if self._backend(name) == "python"]
        self._admin_key = secrets.token_hex(16)
        self._log_start = 0
        self._plain = PlainPaths()
        self._dead_since: float | None = None
        self._prefix = f"regionspot_{os.getpid()}_{secrets.token_hex(4)}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: BinaryIO | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def command(self) -> list[str]:
        ports = self.ports
        return [
            str(self.installation.executable),
            f"--model-repository={self._plain.path(self.repository)}",
            f"--model-config-name={self.target}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self.models),
            f"--backend-directory={self._plain.path(self.installation.backends)}",
            "--disable-auto-complete-config",
            *(f"--{kind}-address={ports.host}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={ports.metrics}",
            f"--allow-gpu-metrics={'false' if self.target == 'cpu' else 'true'}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            # who may load a model may run any program: it takes a key, which only users of this machine can see
            f"--http-restricted-api={ADMIN_APIS}:admin-key={self._admin_key}",
            f"--grpc-restricted-protocol={ADMIN_APIS}:admin-key={self._admin_key}",
            f"--grpc-max-connection-age={CONNECTION_AGE_MS}",
            f"--grpc-max-connection-age-grace={CONNECTION_GRACE_MS}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
        ]

    def start(self) -> None:
        remove_stale_memory()
        if self.log is not None:
            self._log_file = open_log(self.log, "ab")
            self._log_start = self._log_file.tell()
        self._process = subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            env=self.installation.environment(self._plain.path),
            cwd="/",  # its Python finds packages in the folder that it starts in
            start_new_session=True,  # a process group of its own, so that no stub outlives it
            preexec_fn=_end_with_parent,
        )

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until the server answers the canary.

        Raises:
            ServingError: UNAVAILABLE if it does not in time; its log's last lines say why.
        """
        deadline, reason = time.monotonic() + timeout_s, "it does not answer"
        masks = "sam_mask_decoder" in self.models
        while time.monotonic() < deadline:
            if not self.running:
                raise ServingError("UNAVAILABLE", f"the Triton server ended before it was ready:\n{self.last_words()}")
            if self._stubs_stay_dead():
                reason = "processes of its Python backend died when they were started, and it waits for them"
                break
            try:
                with RegionClient(self.ports.grpc_url, max(deadline - time.monotonic(), 1.0), retry=False) as client:
                    canary.check(client, max(deadline - time.monotonic(), 1.0), return_masks=masks)
                    return
            except ServingError as error:
                reason = str(error)
                if error.code not in ("UNAVAILABLE", "TIMEOUT") or STUB_DIED in reason:
                    break
            time.sleep(POLL_S)
        raise ServingError("UNAVAILABLE", f"the Triton server did not get ready: {reason}\n{self.last_words()}")

    def _stubs_stay_dead(self) -> bool:
        """Whether stubs have been dead for DEAD_STUB_S: Triton waits forever for one that dies in silence."""
        assert self.pid is not None
        if not any(stub.state == "Z" for stub in _stub_processes(self.pid)):
            self._dead_since = None
            return False
        if self._dead_since is None:
            self._dead_since = time.monotonic()
        return time.monotonic() - self._dead_since > DEAD_STUB_S

    def missing_stubs(self) -> list[str]:
        """Models of the Python backend whose process is gone; Triton itself goes on calling them ready."""
        return sorted(set(self._python_models) - {name for name, _ in self.stubs()})

    def reload(self, model: str) -> None:
        """Raises ServingError where Triton cannot load it again."""
        with Connection(self.ports.grpc_url, READY_TIMEOUT_S, admin_key=self._admin_key) as connection:
            connection.reload(model)

    def stubs(self) -> list[tuple[str, int]]:
        """(model, process id) of each process of the Python backend."""
        return list(_stubs_of(self.pid)) if self.pid is not None else []

    def last_words(self) -> str:
        """The end of the log, without Triton's tables and Python's frames."""
        if self.log is None:
            return "(its output stands above)"
        if not self.log.is_file():
            return "(it was never started)"
        with open(self.log, "rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        telling = [line for line in lines if not _NOISE.match(line)]
        return "\n".join(line[:400] for line in telling[-LOG_LINES:]) + f"\n(all of it: {self.log})"

    def stop(self) -> None:
        """End the server and its stubs, and remove what they left in shared memory. Never fails."""
        if self._process is not None:
            if self.running:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(EXIT_TIMEOUT_S + 5)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # stubs of a server that was killed
            self._process.wait()
            self._process = None
        for path in SHARED_MEMORY.glob(f"{self._prefix}*"):
            with contextlib.suppress(OSError):
                path.unlink()
        if self._log_file is not None:
            self._log_file.close()
            self._log_file = None
        self._plain.remove()

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _backend(self, model: str) -> str:
        return str(read_config(self.repository / model / "configs" / f"{self.target}.pbtxt").backend)


class Supervisor:
    """Keeps a server answering: reloads a model whose stub died, and starts the server anew when it dies or hangs.

    Args:
        say: told each event, a sentence.
    """

    def __init__(self, server: TritonServer, say: Callable[[str], None] = print) -> None:
        self.server, self._say = server, say
        self._mended: list[float] = []
        self._canary = _CanaryThread(server)

    def run(self) -> None:
        """For ever; a signal's exception ends it.

        Raises:
            ServingError: the server fails again and again.
        """
        self._canary.start()
        try:
            while True:
                time.sleep(POLL_S)
                if not self.server.running:
                    self._restart(f"the Triton server ended:\n{self.server.last_words()}")
                elif gone := self.server.missing_stubs():
                    self._reload(gone, "its process is gone")
                elif self._canary.hangs():
                    self._restart(f"the Triton server has answered nobody for {HANG_S:.0f} s")
                elif (reason := self._canary.unhealthy()) is not None:
                    self._reload([MODEL], f"it fails the canary ({reason})")
        finally:
            self._canary.stop()

    def _reload(self, models: Sequence[str], reason: str) -> None:
        self._count()
        for model in models:
            self._say(f"loading {model} again: {reason}")
            try:
                self.server.reload(model)
            except ServingError as error:
                if self.server.running:
                    self._restart(f"{model} cannot be loaded again ({error})")
                return
        self._canary.forget()
        self._say(f"{', '.join(models)} is back")

    def _restart(self, reason: str) -> None:
        self._say(f"{reason}\nstarting it anew")
        self.server.stop()
        self._count()
        self.server.start()
        try:
            self.server.wait_ready()
            self._say("the server is back")
        except ServingError as error:
            self._say(str(error))  # the next round tries again
        self._canary.forget()

    def _count(self) -> None:
        """Raises ServingError where mending has not helped several times in a row."""
        now = time.monotonic()
        self._mended = [moment for moment in self._mended if now - moment < MENDED_WITHIN_S] + [now]
        if len(self._mended) > MAX_MENDED:
            raise ServingError("UNAVAILABLE", f"the server failed {len(self._mended)} times in a row; given up")


class _CanaryThread:
    """Asks the canary's question now and then; what it finds is for the supervisor to act on."""

    def __init__(self, server: TritonServer) -> None:
        self._server, self._stop = server, threading.Event()
        self._thread = threading.Thread(target=self._run, name="canary", daemon=True)
        self._unhealthy: str | None = None
        self._waiting_since: float | None = None
        self._progress: int | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(POLL_S)  # it may be waiting for an answer; it dies with the process

    def forget(self) -> None:
        self._unhealthy, self._waiting_since = None, None

    def unhealthy(self) -> str | None:
        """Why the canary failed, if it did."""
        return self._unhealthy

    def hangs(self) -> bool:
        since = self._waiting_since
        return since is not None and time.monotonic() - since > HANG_S

    def _run(self) -> None:
        while not self._stop.wait(CANARY_PERIOD_S):
            try:
                with RegionClient(self._server.ports.grpc_url, CANARY_TIMEOUT_S, retry=False) as client:
                    canary.check(client, CANARY_TIMEOUT_S)
                self.forget()
            except ServingError as error:
                if error.code in ("TIMEOUT", "UNAVAILABLE"):
                    self._look_for_progress()
                else:
                    self._unhealthy = str(error)
            except Exception as error:
                self._unhealthy = repr(error)

    def _look_for_progress(self) -> None:
        """Under load the canary waits like everybody else: only a server that answers nobody hangs."""
        done = None
        with contextlib.suppress(RegionSpotError), Connection(self._server.ports.grpc_url, POLL_S) as connection:
            done = int(connection.statistics().get("execution_count", 0))
        if self._waiting_since is None or (done is not None and done != self._progress):
            self._progress, self._waiting_since = done, time.monotonic()


@dataclass(frozen=True)
class ServerRecord:
    """A server that `regionspot-serve up` started, as it is written down for `down`.

    Args:
        pid: of the supervising process.
        started: when the system started it, in its own ticks: process ids are given again.
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
        """Whether its process is still there."""
        return started_at(self.pid) == self.started

    @staticmethod
    def path(home: Path, ports: Ports) -> Path:
        return home / "running" / f"{ports.grpc}.json"

    @classmethod
    def read_all(cls, home: Path) -> list[ServerRecord]:
        """Those that are alive; what a killed one left is removed."""
        found = []
        for path in sorted((home / "running").glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                content: dict[str, Any] = json.loads(path.read_text())
                one = cls(**content | {"ports": Ports(**content["ports"])})
                if one.alive:
                    found.append(one)
                    continue
            path.unlink(missing_ok=True)
        return found


def open_log(path: Path, mode: Literal["ab", "wb"]) -> BinaryIO:
    """A file for a process's output. Raises ArtifactError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode)
    except OSError as error:
        raise ArtifactError(f"the log {path} cannot be written: {why_not_written(error)}") from error


def choose_target(repository: str | Path, target: str | None) -> str:
    """`target` if the repository was made for it, its only one, or that of a CPU.

    Raises:
        ArtifactError: it was not made for it.
    """
    made = targets_of(repository)
    if target is None:
        return "cpu" if "cpu" in made else made[0]
    if target not in made:
        raise ArtifactError(
            f"{repository} was made for {', '.join(made)}, not for {target}: add it with regionspot-serve init "
            f"--target {target} --out {shlex.quote(str(repository))}"
        )
    return target


def start_detached(
    repository: str | Path, home: Path, ports: Ports, target: str | None = None, log: Path | None = None
) -> ServerRecord:
    """`regionspot-serve up` in a process of its own that outlives this one; returns once its server answers.

    Args:
        ports: resolved.

    Raises:
        ServingError: it ended, with what it said, or does not answer in time.
    """
    words = ["serve", "up", "--repository", str(repository), "--home", str(home), "--host", ports.host]
    words += ["--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)]
    for option, value in (("--target", target), ("--log", log)):
        words += [option, str(value)] if value is not None else []
    output = home / "logs" / f"{ports.grpc}.up.log"
    with open_log(output, "wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "regionspot.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            said = output.read_text(errors="replace").strip().removeprefix("error: ")
            raise ServingError("UNAVAILABLE", said or "the server did not start")
        for running in ServerRecord.read_all(home):
            if running.pid == child.pid and running.ready:
                return running
        try:
            time.sleep(POLL_S)
        except BaseException:  # interrupted: nobody would know of it
            child.terminate()
            raise
    child.terminate()
    logs = f"{output} and {log or home / 'logs' / f'{ports.grpc}.log'}"
    raise ServingError("TIMEOUT", f"the server did not answer within {READY_TIMEOUT_S:.0f} s; see {logs}")


@contextlib.contextmanager
def serving(repository: str | Path, home: Path, target: str | None = None) -> Iterator[ServerRecord]:
    """A supervised server on free ports while the block lasts."""
    running = start_detached(repository, home.resolve(), Ports(0, 0, 0).resolved(), target)
    try:
        yield running
    finally:
        stop_running(running)


def stop_running(running: ServerRecord, timeout_s: float = EXIT_TIMEOUT_S + 20.0) -> None:
    """End a supervisor and its server.

    Raises:
        ServingError: it is still there after `timeout_s`.
    """
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(running.pid, signal.SIGTERM)
        except PermissionError as error:
            raise ServingError("UNAVAILABLE", f"process {running.pid} is another user's: let them stop it") from error
    deadline = time.monotonic() + timeout_s
    while running.alive:
        if time.monotonic() > deadline:
            raise ServingError("TIMEOUT", f"process {running.pid} does not end: kill it, and look into {running.log}")
        time.sleep(0.1)


@dataclass(frozen=True)
class _Child:
    """A child process; its state is Z when it has ended and nobody has asked how."""

    pid: int
    state: str


def _stubs_of(pid: int) -> Iterator[tuple[str, int]]:
    """(model, process id) of a server's live stubs: the name of each one's model is among its arguments."""
    for stub in _stub_processes(pid):
        yield from ((match[1], stub.pid) for word in _command_of(stub.pid) if (match := _INSTANCE.fullmatch(word)))


def _stub_processes(pid: int) -> Iterator[_Child]:
    """A server's child processes that are stubs, the dead ones too."""
    for folder in Path("/proc").glob("[0-9]*"):
        child = int(folder.name)
        status = _status_of(child)
        if status and int(status[1]) == pid and _name_of(child) == STUB[:15]:  # the system keeps no more of a name
            yield _Child(child, status[0])


def remove_stale_memory() -> None:
    """Remove from shared memory what servers left whose supervisor was killed; others' is none of our business."""
    for path in SHARED_MEMORY.glob("regionspot_*"):
        owner = path.name.split("_")[1]
        if owner.isdecimal() and started_at(int(owner)) is None:
            with contextlib.suppress(OSError):
                path.unlink()


def started_at(pid: int) -> int | None:
    """When a process was started, in ticks since the system was; None where it has ended."""
    status = _status_of(pid)
    return int(status[19]) if status and status[0] != "Z" else None


def _status_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the process's name, its state first."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _name_of(pid: int) -> str:
    """What the system calls a process; nothing where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    return ""


def _command_of(pid: int) -> list[str]:
    """The words of a process's command line; none where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    return []


def _end_with_parent() -> None:
    """Runs in the child: the kernel ends a server whose supervisor was killed (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _bind(held: socket.socket, host: str, port: int | None) -> None:
    """Take a port; None is METRICS_PORT, or a free one where that is taken."""
    if port is None:
        with contextlib.suppress(OSError):
            held.bind((host, METRICS_PORT))
            return
    held.bind((host, port or 0))


def _reachable(host: str) -> str:
    """An address to connect to: a server that listens everywhere is reached on this machine."""
    return "127.0.0.1" if host == "0.0.0.0" else host
