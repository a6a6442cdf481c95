"""What a soak test runs and breaks: a gateway and a supervised server as a service manager keeps
them, started again whenever they end.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from regionspot.benchmarks.memory import proportional_bytes, tree_of
from regionspot.serving.ports import Ports
from regionspot.serving.processes import SHARED_MEMORY, stub_processes

FULL_DISK = "/dev/full"
"""A file that cannot be written for want of space."""

SHARED_MEMORY_MIB = 512
RESTART_S = 0.5
SAMPLE_S = 2.0
STOP_S = 60.0
TARGETS = ("stub", "decoder", "server", "supervisor", "gateway")
"""What is killed: the process of the model, one that decodes images, Triton, what supervises it,
and the gateway.
"""


class Service:
    """A gateway, and a server with a /dev/shm of its own, each restarted RESTART_S after it ended,
    from `start` to `stop`. Every second start writes its log to a full disk.

    Attributes:
        starts: how often each was started.
        on_full_disk: how many of these starts had no disk to log to.
        peak_bytes: the most that both and all they started had in memory.
    """

    def __init__(self, repository: Path, home: Path, folder: Path) -> None:
        self._folder = folder
        ports = Ports(0, 0, 0).resolved()  # the server has no HTTP: the gateway takes that port
        self.grpc_url, self.web_url = ports.grpc_url, ports.http_url
        up = ["up", "--repository", str(repository), "--home", str(home), "--log", "-"]
        up += ["--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)]
        self._commands = {
            "supervisor": [*_own_shared_memory(), *_command(*up)],
            "gateway": _command("web", "--url", self.grpc_url, "--port", str(ports.http)),
        }
        self.starts = dict.fromkeys(self._commands, 0)
        self.on_full_disk = self.peak_bytes = 0
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, args=(name,), daemon=True)
            for name in self._commands
        ]
        self._threads.append(threading.Thread(target=self._sample, daemon=True))

    def start(self) -> None:
        """Starts both, and does not wait for them."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[str]:
        """Stops both as a service manager does, with SIGTERM.

        Returns:
            What is left of them after STOP_S, which is then killed.
        """
        known = self._everything()
        self._ended.set()
        for thread in self._threads:
            thread.join()
        for started in self._processes.values():
            started.terminate()
        _, alive = psutil.wait_procs(known, STOP_S)
        left = []
        for process in alive:
            with contextlib.suppress(psutil.Error):
                left.append(f"{process.pid} {process.name()}")
                process.kill()
        return left

    def kill(self, target: str, rng: random.Random) -> None:
        """Sends SIGKILL to one of TARGETS. Raises OSError where there is none."""
        try:
            rng.choice(self._found(target)).kill()
        except (IndexError, psutil.Error) as error:
            raise OSError(f"there is no {target}") from error

    @contextlib.contextmanager
    def full_shared_memory(self) -> Iterator[None]:
        """Leaves no byte of the server's shared memory, for the duration of a `with` block.

        Raises:
            OSError: there is no server now.
        """
        folder = Path(f"/proc/{self._processes['supervisor'].pid}/root{SHARED_MEMORY}")
        if folder.stat().st_dev == SHARED_MEMORY.stat().st_dev:
            raise OSError("the server has not mounted its own shared memory")
        path, stop = folder / "fill", threading.Event()
        file = open(path, "wb")  # noqa: SIM115

        def fill() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    space = os.fstatvfs(file.fileno())
                    size = os.fstat(file.fileno()).st_size
                    left = max(space.f_bavail, 1) * space.f_frsize
                    os.posix_fallocate(file.fileno(), size, left)
                time.sleep(0.05)

        thread = threading.Thread(target=fill, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            file.close()
            with contextlib.suppress(OSError):
                path.unlink()

    def _keep(self, name: str) -> None:
        """What systemd's Restart=always does."""
        while not self._ended.is_set():
            self.starts[name] += 1
            full = self.starts[name] % 2 == 0
            self.on_full_disk += full
            path = FULL_DISK if full else self._folder / f"{name}.log"
            with open(path, "ab") as log:
                self._processes[name] = process = subprocess.Popen(
                    self._commands[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            while process.poll() is None and not self._ended.wait(0.05):
                pass
            self._ended.wait(RESTART_S)

    def memory_bytes(self) -> int:
        """Of all processes together; pages that several share count once."""
        total = 0
        for started in list(self._processes.values()):
            for pid in tree_of(started.pid):
                with contextlib.suppress(OSError, KeyError):  # it ended meanwhile
                    total += proportional_bytes(pid)
        return total

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self.memory_bytes())

    def _everything(self) -> list[psutil.Process]:
        found = []
        for process in list(self._processes.values()):
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(process.pid)
                found += [root, *root.children(recursive=True)]
        return found

    def _found(self, target: str) -> list[psutil.Process]:
        if target in self._commands:
            process = self._processes[target]
            return [psutil.Process(process.pid)] if process.poll() is None else []
        servers = [one for one in self._everything() if _is_triton(one)]
        if target == "server":
            return servers
        stubs = [stub for server in servers for stub in stub_processes(server.pid)]
        if target == "stub":
            return stubs
        found = []
        for stub in stubs:
            with contextlib.suppress(psutil.Error):
                found += stub.children()
        return found


def _is_triton(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() == "tritonserver"
    return False


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "regionspot.cli.main", "serve", *words]


def _own_shared_memory() -> Sequence[str]:
    """A command that runs another one with a small /dev/shm, which can be filled without harm."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    mount = f"mount -t tmpfs -o size={SHARED_MEMORY_MIB}m,mode=1777 tmpfs {SHARED_MEMORY}"
    return ["unshare", "--mount", *user, "sh", "-c", f'{mount} && exec "$@"', "sh"]
