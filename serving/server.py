"""A Triton server as a child process: its command line, start, first answer, and a stop that leaves
nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import BinaryIO, Literal

from regionspot.errors import ArtifactError
from regionspot.files import why_not_written
from regionspot.serving import canary
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import GPU_INDEX, ServingError
from regionspot.serving.environment import Installation
from regionspot.serving.gpu import check_memory, first_gpu
from regionspot.serving.model_config import read_config
from regionspot.serving.plain_paths import PlainPaths
from regionspot.serving.ports import Ports
from regionspot.serving.processes import (
    has_dead_stub,
    remove_orphaned_shared_memory,
    remove_shared_memory,
    running_stubs,
    shared_memory_prefix,
    terminate_with_parent,
)
from regionspot.serving.repository import graphs_on_gpu, models_of, targets_of
from regionspot.serving.triton import STUB_DIED, Connection

EXIT_TIMEOUT_S = 10
READY_TIMEOUT_S = 600.0
"""Large models are read, checked and compiled when the canary first asks for them."""

POLL_S = 0.5
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
LOG_LINES = 12
LOG_LINE_LENGTH = 400
_NOISE = re.compile(r"[|+]|I\d{4} |[\s;]*$|At:|\s+\S+\(\d+\): \S+$")
"""Lines of Triton's log that explain no failure: tables, information, stack frames of Python."""


class TritonServer:
    """One server process over a model repository. Use it as a context manager, or call `stop`.

    Args:
        repository: From `regionspot-serve init`.
        target: One that the repository was made for; None takes its only one, or cpu.
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
        target: str | None = None,
    ) -> None:
        self.installation = installation
        self.repository = Path(repository)
        self.ports = ports
        self.log = log
        self.target = choose_target(repository, target)
        self.models = models_of(repository, self.target)
        self._backends = {name: self._backend(name) for name in self.models}
        self._python_models = [
            name for name, backend in self._backends.items() if backend == "python"
        ]
        self._graphs_on_gpu = (
            None if self.target == "cpu" else graphs_on_gpu(self.repository, self.target)
        )
        self._admin_key = secrets.token_hex(16)
        self._log_start = 0
        self._plain = PlainPaths()
        self._dead_since: float | None = None
        self._memory_prefix = shared_memory_prefix()
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
            # Whoever may load a model may run any program: it takes a key that only users of this
            # machine can see.
            f"--http-restricted-api={ADMIN_APIS}:admin-key={self._admin_key}",
            f"--grpc-restricted-protocol={ADMIN_APIS}:admin-key={self._admin_key}",
            f"--grpc-max-connection-age={CONNECTION_AGE_MS}",
            f"--grpc-max-connection-age-grace={CONNECTION_GRACE_MS}",
            f"--backend-config=python,shm-region-prefix-name={self._memory_prefix}",
            *self._gpu_options(),
        ]

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
        remove_orphaned_shared_memory()
        if self.log is not None:
            self._log_file = open_log(self.log, "ab")
            self._log_start = self._log_file.tell()
        self._process = subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            env=self.installation.environment(self._plain.path),
            cwd="/",  # its Python would import packages from the current directory
            start_new_session=True,  # a process group of its own, so that `stop` ends every stub
            preexec_fn=terminate_with_parent,
        )

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Waits until the server answers the canary.

        Raises:
            ServingError: UNAVAILABLE if it does not in time; the end of its log says why.
        """
        deadline = time.monotonic() + timeout_s
        reason = "it does not answer"
        masks = "sam_mask_decoder" in self.models
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
            try:
                with RegionClient(
                    self.ports.grpc_url, max(deadline - time.monotonic(), 1.0), retry=False
                ) as client:
                    canary.check(client, max(deadline - time.monotonic(), 1.0), return_masks=masks)
                    return
            except ServingError as error:
                reason = str(error)
                if error.code not in ("UNAVAILABLE", "TIMEOUT") or STUB_DIED in reason:
                    break
            time.sleep(POLL_S)
        raise ServingError(
            "UNAVAILABLE", f"the Triton server did not get ready: {reason}\n{self.log_tail()}"
        )

    def _stub_stays_dead(self) -> bool:
        """Returns whether some stub has been dead for `DEAD_STUB_S`."""
        assert self.pid is not None
        if not has_dead_stub(self.pid):
            self._dead_since = None
            return False
        if self._dead_since is None:
            self._dead_since = time.monotonic()
        return time.monotonic() - self._dead_since > DEAD_STUB_S

    def missing_stubs(self) -> list[str]:
        """Returns the models of the Python backend whose process is gone. Triton goes on reporting
        them as ready.
        """
        if self.pid is None:
            return sorted(self._python_models)
        running = {model for model, _ in running_stubs(self.pid)}
        return sorted(set(self._python_models) - running)

    def reload(self, model: str) -> None:
        """Loads a model again, in a new process.

        Raises:
            ServingError: Triton cannot load it.
        """
        with Connection(
            self.ports.grpc_url, READY_TIMEOUT_S, admin_key=self._admin_key
        ) as connection:
            connection.reload(model)

    def log_tail(self) -> str:
        """Returns the end of the log, without Triton's tables and Python's stack frames."""
        if self.log is None:
            return "(its output stands above)"
        if not self.log.is_file():
            return "(it was never started)"
        with open(self.log, "rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        relevant = [line[:LOG_LINE_LENGTH] for line in lines if not _NOISE.match(line)]
        return "\n".join(relevant[-LOG_LINES:]) + f"\n(all of it: {self.log})"

    def stop(self) -> None:
        """Ends the server and its stubs, and removes their shared memory. Raises nothing."""
        if self._process is not None:
            if self.running:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(EXIT_TIMEOUT_S + 5)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # the stubs of a server that was killed
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        remove_shared_memory(self._memory_prefix)
        if self._log_file is not None:
            self._log_file.close()
            self._log_file = None
        self._plain.remove()

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
        return str(
            read_config(self.repository / model / "configs" / f"{self.target}.pbtxt").backend
        )


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


def open_log(path: Path, mode: Literal["ab", "wb"]) -> BinaryIO:
    """Opens a file for a process's output, and creates its folder.

    Raises:
        ArtifactError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode)
    except OSError as error:
        raise ArtifactError(
            f"the log {path} cannot be written: {why_not_written(error)}"
        ) from error
