"""A Triton server as a child process: its command line, start, first answer, and a stop that leaves
nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from regionspot.errors import ArtifactError, InputError
from regionspot.serving import canary
from regionspot.serving.backends.instances import INSTANCES_VARIABLE, THREADS_VARIABLE
from regionspot.serving.calls import started
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import GPU_INDEX, MAX_BATCH, MODEL, Limits, ServingError
from regionspot.serving.environment import Installation
from regionspot.serving.gpu import check_memory, first_gpu
from regionspot.serving.log_file import LogFile
from regionspot.serving.model_config import read_config
from regionspot.serving.plain_paths import PlainPaths
from regionspot.serving.ports import Ports
from regionspot.serving.processes import (
    SHARED_MEMORY,
    cpu_seconds,
    has_dead_stub,
    has_ended,
    make_shared_memory_private,
    remove_orphaned_shared_memory,
    remove_shared_memory,
    running_stubs,
    shared_memory_prefix,
    start_ticks,
)
from regionspot.serving.repository import GRAPHS_INSIDE, graphs_on_gpu, models_of, targets_of
from regionspot.serving.tls import ServerTls
from regionspot.serving.tracing import traces_url
from regionspot.serving.triton import STUB_DIED, Connection

EXIT_TIMEOUT_S = 20
"""How long a server that is told to stop works on the requests that it has accepted."""

TRITONS_EXIT_TIMEOUT_S = 3600
"""Triton's own limit for the same. It crashes and hangs where that is over, so it must not be."""

READY_TIMEOUT_S = 600.0
"""Large models are read, checked and compiled when the canary first asks for them."""

POLL_S, EXIT_POLL_S = 0.5, 0.05
DEAD_STUB_S = 5.0
"""A server is given up at its start when a stub has been dead for this long: Triton waits for it
without end.
"""

CONNECTION_AGE_MS = 300_000
"""Clients resolve a server's name again when a connection ends, and so find servers that were
added.
"""

CONNECTION_GRACE_MS = 120_000
ADMIN_APIS = "model-repository,shared-memory,trace,logging"
NO_HEADER = "refused-to-all\n"
"""The header that a client must send to use `ADMIN_APIS`: neither HTTP nor gRPC can carry a name
with a line feed. Who may load a model may run any program, and every user of the machine can read
the command line, where a key would stand.
"""

SERVICE = "regionspot-triton"
"""What traces call the server."""

LAUNCHER = Path(__file__).with_name("launcher.py")
SEGMENT_BYTES = 1 << 30
"""The largest segment of shared memory of a server that has models for single graphs: they take
tensors of any size.
"""

MESSAGE_BYTES = 64 << 20
"""Room for all but the images of the largest request to the public model, and its answer."""


@dataclass(frozen=True)
class ServerOptions:
    """How a server runs a repository.

    Args:
        target: One that the repository was made for; None takes its only one, or cpu.
        instances: Of the model, that answer side by side on a CPU; None stands for
            `regionspot.serving.backends.instances.cpu_instances`.
        threads: Of each instance; None likewise.
        all_models: Also load each graph as a model, where the public model does without.
        tls: For the gRPC port; None leaves it without TLS.
        otlp_endpoint: Where Triton sends traces, see `regionspot.serving.tracing.traces_url`.
    """

    target: str | None = None
    instances: int | None = None
    threads: int | None = None
    all_models: bool = False
    tls: ServerTls | None = None
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("instances", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")
        if self.otlp_endpoint is not None:
            traces_url(self.otlp_endpoint)

    def variables(self) -> dict[str, str]:
        """Returns what tells the process of the public model."""
        given = {INSTANCES_VARIABLE: self.instances, THREADS_VARIABLE: self.threads}
        return {name: str(value) for name, value in given.items() if value is not None}

    def up_options(self) -> list[str]:
        """Returns the options of `regionspot-serve up` that say the same."""
        values = {
            "--target": self.target,
            "--instances": self.instances,
            "--threads": self.threads,
            "--otlp-endpoint": self.otlp_endpoint,
        }
        options = [
            text
            for option, value in values.items()
            if value is not None
            for text in (option, str(value))
        ]
        if self.all_models:
            options.append("--all-models")
        return options + (self.tls.up_options() if self.tls else [])

    def trace_options(self) -> list[str]:
        """Returns Triton's options for traces."""
        if self.otlp_endpoint is None:
            return []
        settings = [
            "mode=opentelemetry",
            "level=TIMESTAMPS",
            "rate=1",
            f"opentelemetry,url={traces_url(self.otlp_endpoint)}",
            f"opentelemetry,resource=service.name={SERVICE}",
        ]
        return [f"--trace-config={setting}" for setting in settings]


DEFAULT_OPTIONS = ServerOptions()


class TritonServer:
    """One server process over a model repository. Use it as a context manager, or call `stop`.

    Args:
        repository: From `regionspot-serve init`.
        ports: From `Ports.resolved`.
        log: File for the server's output; None passes it on to this process's own output.

    Raises:
        ArtifactError: There is no repository, or it was not made for the target.
    """

    def __init__(
        self,
        installation: Installation,
        repository: str | Path,
        ports: Ports,
        log: Path | None,
        options: ServerOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.installation = installation
        self._tls = options.tls
        self.repository = Path(repository)
        self.ports = ports
        self.log = None if log is None else LogFile(log)
        self.target = choose_target(repository, options.target)
        self._options = options
        inside = self._parameter("run_graphs") == GRAPHS_INSIDE
        self.models = (
            [MODEL] if inside and not options.all_models else models_of(repository, self.target)
        )
        self._backends = {name: self._backend(name) for name in self.models}
        self._python_models = [
            name for name, backend in self._backends.items() if backend == "python"
        ]
        self._graphs_on_gpu = (
            None if self.target == "cpu" else graphs_on_gpu(self.repository, self.target)
        )
        self._name = f"regionspot-{secrets.token_hex(8)}"
        self._plain = PlainPaths()
        self._dead_since: float | None = None
        self._most_stubs = 0  # that ran at once since the start
        self._stubs: list[tuple[str, int, int | None]] = []
        self._memory_prefix = shared_memory_prefix()
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: BinaryIO | None = None

    @property
    def url(self) -> str:
        """Where a client on this machine finds it, with `client_files`."""
        return f"grpcs://localhost:{self.ports.grpc}" if self._tls else self.ports.grpc_url

    @property
    def client_files(self) -> dict[str, Any]:
        """Arguments of `RegionClient` beside the address."""
        return self._tls.client_files() if self._tls else {}

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        return self._process is not None and not has_ended(self._process.pid)

    def command(self) -> list[str]:
        """Returns the server's command line. It holds no secret: every user of the machine can
        read it.
        """
        ports = self.ports
        address = f"ipv6:{ports.host}" if ":" in ports.host else ports.host
        return [
            str(self.installation.executable),
            f"--model-repository={self._plain.path(self.repository)}",
            f"--model-config-name={self.target}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self.models),
            f"--backend-directory={self._plain.path(self.installation.backends)}",
            "--disable-auto-complete-config",
            f"--id={self._name}",
            *self._http_options(address),
            f"--grpc-address={ports.url_host}",
            f"--grpc-port={ports.grpc}",
            *(self._tls.triton_options() if self._tls else ()),
            f"--grpc-restricted-protocol={ADMIN_APIS}:{NO_HEADER}=refused",
            f"--metrics-address={address}",
            f"--metrics-port={ports.metrics}",
            f"--allow-gpu-metrics={'false' if self.target == 'cpu' else 'true'}",
            f"--exit-timeout-secs={TRITONS_EXIT_TIMEOUT_S}",
            f"--grpc-max-connection-age={CONNECTION_AGE_MS}",
            f"--grpc-max-connection-age-grace={CONNECTION_GRACE_MS}",
            f"--backend-config=python,shm-region-prefix-name={self._memory_prefix}",
            *self._options.trace_options(),
            *self._gpu_options(),
        ]

    def _http_options(self, address: str) -> list[str]:
        if self.ports.http is None:
            return ["--allow-http=false"]
        options = [
            f"--http-address={address}",
            f"--http-port={self.ports.http}",
            f"--http-restricted-api={ADMIN_APIS}:{NO_HEADER}=refused",
        ]
        if self.installation.takes("--http-max-input-size"):
            images = MAX_BATCH * self._limits().max_image_bytes
            options.append(f"--http-max-input-size={images + MESSAGE_BYTES}")
        return options

    def _limits(self) -> Limits:
        return Limits.from_json(self._parameter("limits"))

    def _parameter(self, name: str) -> Any:
        """Returns a parameter of the public model's configuration."""
        return json.loads(read_config(self._config_path(MODEL)).parameters[name].string_value)

    def _max_segment_bytes(self) -> int:
        """Returns how large a segment of shared memory may get: what the largest legal request
        takes, and never more than half of what there is, so that no request fills it. A segment
        never shrinks.
        """
        largest = MAX_BATCH * self._limits().max_image_bytes + MESSAGE_BYTES
        if self.models != [MODEL]:
            largest = max(largest, SEGMENT_BYTES)
        return min(largest, shutil.disk_usage(SHARED_MEMORY).total // 2)

    def _gpu_options(self) -> list[str]:
        """Of a target that runs on a GPU: room for the tensors that stay there, and leave to load
        engines of an earlier TensorRT where some were built for that.
        """
        graphs = self._graphs_on_gpu
        if graphs is None:
            return []
        options = [f"--cuda-memory-pool-byte-size={GPU_INDEX}:{graphs.pool_bytes()}"]
        if graphs.need_host_code:
            options.append("--backend-config=tensorrt,version-compatible=true")
        return options

    def _check_gpu(self) -> None:
        """Raises ArtifactError where the engines do not load on this machine, or do not fit."""
        graphs = self._graphs_on_gpu
        gpu = None if graphs is None else first_gpu()
        if graphs is None or gpu is None:
            return
        if problems := graphs.why_not_loadable(gpu):
            raise ArtifactError(
                f"{self.repository} holds engines for another machine: {'; '.join(problems)}. "
                "Export them here, in the builder image of this server"
            )
        if gpu.memory_mib is not None:
            check_memory(graphs.memory(), gpu.memory_mib << 20, gpu.name)

    def start(self) -> None:
        """Starts the process and returns at once; `wait_ready` waits for its first answer.

        Raises:
            ArtifactError: The log cannot be written, or the engines are for another GPU or
                TensorRT, or do not fit.
        """
        self._check_gpu()
        self._dead_since = None
        self._most_stubs = 0
        remove_orphaned_shared_memory()
        launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())]
        if self.log is not None:
            self._log_file = self.log.open()
        self._process = subprocess.Popen(
            [*launcher, str(self._max_segment_bytes()), *self.command()],
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            env=self.installation.environment(self._plain.path) | self._options.variables(),
            cwd="/",  # its Python would import packages from the current directory
            start_new_session=True,  # a process group of its own, so that `stop` ends every stub
            umask=0o077,
        )

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Waits until the server answers the canary.

        Raises:
            ServingError: UNAVAILABLE if it does not in time; the end of its log says why.
        """
        deadline = time.monotonic() + timeout_s
        reason = "it does not answer"
        asked: Future[bool] | None = None
        while time.monotonic() < deadline:
            if not self.running:
                raise ServingError(
                    "UNAVAILABLE",
                    f"the Triton server ended before it was ready{self._missing_backends()}:\n"
                    f"{self.log_tail()}",
                )
            if self._stub_stays_dead():
                reason = (
                    "processes of its Python backend died when they were started, and it waits for "
                    "them"
                )
                break
            if asked is None:
                # in a thread: Triton does not answer a request whose stub has died
                left_s = max(deadline - time.monotonic(), 1.0)
                asked = started(partial(self._answers_canary, left_s))
            wait([asked], POLL_S)
            if not asked.done():
                continue
            try:
                if asked.result():
                    self._remember_stubs()
                    return
                reason = f"another server answers at {self.url}"
            except ServingError as error:
                reason = str(error)
                if error.code not in ("UNAVAILABLE", "TIMEOUT") or STUB_DIED in reason:
                    break
            asked = None
            time.sleep(POLL_S)
        raise ServingError(
            "UNAVAILABLE", f"the Triton server did not get ready: {reason}\n{self.log_tail()}"
        )

    def _answers_canary(self, timeout_s: float) -> bool:
        """Returns whether it is this server that listens on its port, once it has answered the
        canary.
        """
        if not self._is_who_answers(timeout_s):
            return False
        make_shared_memory_private(self._memory_prefix)
        masks = "sam_mask_decoder" in self._parameter("graphs")
        with self.client(timeout_s) as client:
            canary.check(client, timeout_s, return_masks=masks)
        return True

    def client(self, timeout_s: float) -> RegionClient:
        """Returns a client of this server that does not try again."""
        return RegionClient(self.url, timeout_s, retry=False, **self.client_files)

    def _stub_stays_dead(self) -> bool:
        """Returns whether some stub has been dead for `DEAD_STUB_S`. Triton may have waited for it,
        so that there is no process left.
        """
        assert self.pid is not None
        running = len(running_stubs(self.pid))
        self._most_stubs = max(self._most_stubs, running)
        if running == self._most_stubs and not has_dead_stub(self.pid):
            self._dead_since = None
            return False
        if self._dead_since is None:
            self._dead_since = time.monotonic()
        return time.monotonic() - self._dead_since > DEAD_STUB_S

    def _is_who_answers(self, timeout_s: float) -> bool:
        """Returns whether this server listens on its port, and not another one."""
        with Connection(self.url, timeout_s, retry=False, **self.client_files) as connection:
            metadata = connection.call(
                lambda client, left_s: client.get_server_metadata(client_timeout=left_s)
            )
        return bool(metadata.name == self._name)

    def _remember_stubs(self) -> None:
        assert self.pid is not None
        self._stubs = [(model, pid, start_ticks(pid)) for model, pid in running_stubs(self.pid)]

    def missing_stubs(self) -> list[str]:
        """Returns the models of the Python backend of which a process has died since the server
        got ready. Triton goes on reporting them as ready.
        """
        gone = {model for model, pid, started in self._stubs if start_ticks(pid) != started}
        known = {model for model, _, _ in self._stubs}
        return sorted(gone | (set(self._python_models) - known))

    def cpu_seconds(self) -> float:
        """Returns the processor time that the server and its stubs have used."""
        own: Iterable[int] = () if self.pid is None else (self.pid,)
        return cpu_seconds([*own, *(pid for _, pid, _ in self._stubs)])

    def tidy(self) -> None:
        """Bounds the log, and makes shared memory private. Call it now and then."""
        if self.log is not None:
            self.log.rotate()
        make_shared_memory_private(self._memory_prefix)

    def log_tail(self) -> str:
        """Returns the end of the log, without Triton's tables and Python's stack frames."""
        return "(its output stands above)" if self.log is None else self.log.tail()

    def stop(self, drain: bool = True) -> None:
        """Ends the server and its stubs, and removes their shared memory. Raises nothing.

        Args:
            drain: Waits until the requests that were accepted are answered, at most
                `EXIT_TIMEOUT_S`. Others are refused as UNAVAILABLE meanwhile.
        """
        if self._process is not None:
            if drain and self.running:
                self._process.terminate()
                self._wait_for_end(EXIT_TIMEOUT_S)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # the server, or the stubs of one that was killed; nobody has waited for it yet, so
                # that the id of its group is still its own
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        self._stubs = []
        remove_shared_memory(self._memory_prefix)
        if self._log_file is not None:
            self._log_file.close()
            self._log_file = None
        self._plain.remove()

    def _wait_for_end(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline:
            time.sleep(EXIT_POLL_S)

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _missing_backends(self) -> str:
        """Says which backends of the target this server lacks; nothing if it has all."""
        missing = sorted(
            backend
            for backend in set(self._backends.values())
            if not (self.installation.backends / backend).is_dir()
        )
        if not missing:
            return ""
        return (
            f", for it has no backend {' or '.join(missing)} in {self.installation.backends}: the "
            "server of PyPI has the Python backend alone, so run the target in NVIDIA's container "
            "(docs/serve/gpu-machine.md)"
        )

    def _backend(self, model: str) -> str:
        return str(read_config(self._config_path(model)).backend)

    def _config_path(self, model: str) -> Path:
        return self.repository / model / "configs" / f"{self.target}.pbtxt"


def choose_target(repository: str | Path, target: str | None) -> str:
    """Returns `target` if the repository was made for it; for None the repository's cpu target, or
    its first one.

    Raises:
        ArtifactError: The repository was not made for it.
    """
    available = targets_of(repository)
    if target is None:
        return "cpu" if "cpu" in available else available[0]
    if target not in available:
        raise ArtifactError(
            f"{repository} was made for {', '.join(available)}, not for {target}: add it with "
            f"regionspot-serve init --target {target} --out {shlex.quote(str(repository))}"
        )
    return target
