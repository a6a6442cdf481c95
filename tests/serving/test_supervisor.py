"""The supervisor and its server in this process, over faults that a user's command would take
minutes to notice.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from regionspot.serving import canary, log_file, server, supervisor
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import MODEL, Limits, ServingError
from regionspot.serving.environment import find_installation
from regionspot.serving.ports import Ports
from regionspot.serving.processes import SHARED_MEMORY, running_stubs, start_ticks
from regionspot.serving.repository import RepositoryOptions, make_repository
from regionspot.serving.server import TritonServer
from regionspot.serving.supervisor import CanaryThread, Supervisor
from regionspot.serving.triton import Connection

BOX = [[5, 5, 90, 90]]
WAIT_S = 300.0


@pytest.fixture(scope="module")
def own(
    mini_artifacts_with_masks: Path, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server of the public model alone, which takes images of 4 MB at most."""
    folder = tmp_path_factory.mktemp("own")
    limits = replace(Limits(), max_image_bytes=4 << 20)
    options = RepositoryOptions(vocabularies={"pets": "cat,dog"}, limits=limits)
    for name in make_repository(mini_artifacts_with_masks, folder / "repository", options):
        if name != MODEL:
            (folder / "repository" / name / "configs" / "cpu.pbtxt").unlink()
    ports = Ports(0, 0, 0).resolved()
    with TritonServer(
        find_installation(home), folder / "repository", ports, folder / "log"
    ) as started:
        started.start()
        started.wait_ready()
        yield started


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a supervisor that a test can wait for."""
    for name, seconds in (
        ("CANARY_PERIOD_S", 0.3),
        ("CANARY_TIMEOUT_S", 1.0),
        ("IDLE_HANG_S", 3.0),
        ("FIRST_PAUSE_S", 0.05),
        ("MAX_PAUSE_S", 0.2),
        ("SLOWEST_ANSWERS", 2),
    ):
        monkeypatch.setattr(supervisor, name, seconds)


class Supervised:
    """A supervisor that looks while a test waits for one of its events. A server ends with the
    thread that started it, so this is done in the test's own.
    """

    def __init__(self, watched: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        monkeypatch.setattr(supervisor.logger, "info", self.events.append)
        self._supervisor = Supervisor(watched)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not any(text in event for event in self.events):
            assert time.monotonic() < deadline, self.events
            time.sleep(0.1)
            self._supervisor._check()

    def __enter__(self) -> Supervised:
        self._supervisor._canary.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._supervisor._canary.stop()


def stub_of(watched: TritonServer) -> int:
    assert watched.pid is not None
    return dict(running_stubs(watched.pid))[MODEL]


def infer(watched: TritonServer, image: bytes) -> dict[str, Any]:
    with Connection(watched.ports.grpc_url, 60, retry=False) as connection:
        return connection.infer(
            MODEL,
            {
                "image": np.array([[image]], np.object_),
                "boxes": np.array([BOX], np.float32),
                "vocabulary": np.array([[b"pets"]], np.object_),
            },
        )


# Who may do what


def restricted(watched: TritonServer, option: str) -> tuple[str, str]:
    """The header that opens what is restricted, as any user of this machine can read it."""
    words = Path(f"/proc/{watched.pid}/cmdline").read_text().split("\0")
    (value,) = (word for word in words if word.startswith(f"--{option}="))
    apis, _, header = value.partition("=")[2].partition(":")
    assert set(apis.split(",")) == {"model-repository", "shared-memory", "trace", "logging"}
    name, _, content = header.partition("=")
    return name, content


class Http2Call:
    """One gRPC call without a library: any header can be sent."""

    def __init__(self, port: int, method: str, headers: dict[str, str]) -> None:
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/inference.GRPCInferenceService/{method}",
            ":authority": "x",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        block = b"".join(self._field(*one) for one in (fields | headers).items())
        self._frames: list[tuple[int, bytes]] = []
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
                + self._frame(4, 0, 0, b"")
                + self._frame(1, 4, 1, block)
                + self._frame(0, 1, 1, bytes(5))
            )
            with connection.makefile("rb") as answer:
                self._read(answer)

    @property
    def answered(self) -> bool:
        """Whether the call was successful: a message came, and a status of 0."""
        kinds = [kind for kind, _ in self._frames]
        return 0 in kinds and any(b"grpc-status\x010" in payload for _, payload in self._frames)

    def _read(self, answer: Any) -> None:
        while len(head := answer.read(9)) == 9:
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            self._frames.append((kind, answer.read(int.from_bytes(head[:3], "big"))))
            if (stream == 1 and kind in (0, 1) and flags & 1) or kind in (3, 7):
                return

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload))[1:]
            + bytes([kind, flags])
            + struct.pack(">I", stream)
            + payload
        )

    @staticmethod
    def _field(name: str, value: str) -> bytes:
        """A literal without Huffman's code, of fewer than 127 bytes each."""
        parts = [name.encode(), value.encode()]
        return b"\0" + b"".join(bytes([len(part)]) + part for part in parts)


def test_nobody_may_use_the_admin_apis(own: TritonServer) -> None:
    """Not even who reads the server's command line, and sends what stands there byte by byte."""
    name, value = restricted(own, "grpc-restricted-protocol")
    header = {f"triton-grpc-protocol-{name}": value}
    assert Http2Call(own.ports.grpc, "ServerLive", {}).answered
    for method in ("RepositoryIndex", "SystemSharedMemoryStatus", "TraceSetting", "LogSettings"):
        for headers in (header, {name: value}, {}):
            assert not Http2Call(own.ports.grpc, method, headers).answered
    assert Http2Call(own.ports.grpc, "ServerLive", {}).answered


@pytest.mark.parametrize(
    "path",
    ["repository/index", f"repository/models/{MODEL}/unload", "logging", "systemsharedmemory/x"],
)
def test_nobody_may_use_them_over_http(own: TritonServer, path: str) -> None:
    name, value = restricted(own, "http-restricted-api")
    assert own.ports.http is not None
    for lines in (
        f"{name}: {value}",
        f"{name.strip()}: {value}",
        f"{name.strip()}\r\n : {value}",
        f"{name.strip()}%0a: {value}",
    ):
        head = f"POST /v2/{path} HTTP/1.1\r\nHost: x\r\n{lines}\r\nContent-Length: 2\r\n\r\n{{}}"
        with socket.create_connection(("127.0.0.1", own.ports.http), 5) as connection:
            connection.sendall(head.encode())
            assert not connection.recv(100).startswith(b"HTTP/1.1 2")
    with urllib.request.urlopen(f"{own.ports.http_url}/v2/health/live") as response:
        assert response.status == 200


def test_an_image_that_is_too_large_does_not_fill_shared_memory(
    own: TritonServer, picture: Path
) -> None:
    with pytest.raises(ServingError):
        infer(own, bytes(200 << 20))
    held = sum(path.stat().st_size for path in SHARED_MEMORY.glob(f"{own._memory_prefix}*"))
    assert held < 120 << 20
    assert infer(own, picture.read_bytes())["scores"].shape == (1, 1)


def test_a_release_gets_the_options_that_it_has(
    own: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own.installation.takes("--grpc-port") and not own.installation.takes("--grpc-por")
    assert not any("max-input-size" in word for word in own.command())
    newer = tmp_path / "tritonserver"
    newer.write_text("#!/bin/sh\necho '  --http-max-input-size <integer>'\n")
    newer.chmod(0o755)
    monkeypatch.setattr(own, "installation", replace(own.installation, executable=newer))
    assert f"--http-max-input-size={8 * (4 << 20) + (64 << 20)}" in own.command()


def test_another_server_on_the_port(own: TritonServer, home: Path, tmp_path: Path) -> None:
    """It answers, but is not the one that was started."""
    idle = tmp_path / "tritonserver"
    idle.write_text("#!/bin/sh\ntest $1 = --help || exec sleep 60\n")
    idle.chmod(0o755)
    installation = replace(find_installation(home), executable=idle)
    with TritonServer(installation, own.repository, own.ports, tmp_path / "log") as other:
        other.start()
        with pytest.raises(ServingError, match="another server answers at"):
            other.wait_ready(2)
        other.stop(drain=False)
    canary.check_progress(own.ports.grpc_url, 10)


# What the supervisor sees


def test_processes_are_watched_without_reading_all(
    own: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_processes(*_: object) -> None:
        raise AssertionError("the processes of the whole machine were read")

    for module, name in ((psutil, "pids"), (psutil._psplatform, "ppid_map")):  # type: ignore[attr-defined]
        monkeypatch.setattr(module, name, all_processes)
    assert own.running and own.missing_stubs() == [] and own.cpu_seconds() > 0
    own.tidy()


def test_a_server_that_computes_gets_more_time(own: TritonServer, picture: Path) -> None:
    watch = CanaryThread(own)
    asked, used = time.monotonic(), own.cpu_seconds()
    with RegionClient(own.ports.grpc_url) as client:
        client.info()
        while time.monotonic() - asked < 1.5:
            client.recognize(picture, BOX * 100, "pets", return_masks=True)
    watch._look_for_progress(asked, used)
    assert watch.hang_s() == supervisor.HANG_S and not watch.hangs()
    asked, used = time.monotonic(), own.cpu_seconds()
    time.sleep(1)
    watch._look_for_progress(asked, used)
    assert watch.hang_s() == supervisor.IDLE_HANG_S
    watch._slowest_s = 10.0
    assert watch.hang_s() == 10.0 * supervisor.SLOWEST_ANSWERS
    watch._slowest_s = 1000.0
    assert watch.hang_s() == supervisor.HANG_S


def test_the_log_is_bounded(own: TritonServer) -> None:
    assert own.log is not None
    with open(own.log.path, "ab") as log:
        log.write(b"x" * log_file.MAX_BYTES)
    Supervisor(own)._check()
    earlier = own.log.path.with_name("log.1")
    assert earlier.stat().st_size > log_file.MAX_BYTES and own.log.path.stat().st_size == 0
    with pytest.raises(ServingError):
        infer(own, b"no image")
    deadline = time.monotonic() + WAIT_S
    while b"IMAGE_INVALID" not in own.log.path.read_bytes():  # the server writes on, at its start
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert own.log.path.stat().st_size < 10_000


@pytest.mark.usefixtures("quick")
def test_a_model_that_is_stopped(
    own: TritonServer, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer(own, picture.read_bytes())
    before = own.pid
    with Supervised(own, monkeypatch) as supervised:
        os.kill(stub_of(own), signal.SIGSTOP)
        supervised.wait_for("the server was restarted in")
    assert supervised.events[0].startswith("the Triton server has answered nobody for")
    assert own.pid != before
    assert infer(own, picture.read_bytes())["scores"].shape == (1, 1)


@pytest.mark.usefixtures("quick")
def test_a_server_that_fails_to_start_is_tried_until_it_starts(
    own: TritonServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often: what keeps it from starting may be over later. The pauses grow."""
    executable = tmp_path / "tritonserver"
    executable.symlink_to("/bin/false")
    works = own.installation.executable
    monkeypatch.setattr(own, "installation", replace(own.installation, executable=executable))
    with Supervised(own, monkeypatch) as supervised:
        assert own.pid is not None
        os.kill(own.pid, signal.SIGKILL)
        supervised.wait_for("it failed to start 11 times: waiting for")
        executable.unlink()
        executable.symlink_to(works)
        supervised.wait_for("the server was restarted in")
    pauses = [event for event in supervised.events if "waiting" in event]
    for failures, event in enumerate(pauses, 1):
        assert event.startswith(f"it failed to start {failures} times")
    assert own.running
    canary.check_progress(own.ports.grpc_url, 10)


def test_pauses_grow() -> None:
    waited = [supervisor.pause_s(failures) for failures in (1, 2, 3, 6, 7, 10_000)]
    assert waited == [1, 2, 4, 32, 60, 60]


# How it ends


def test_the_id_of_a_server_that_was_killed_is_kept_until_it_is_stopped(own: TritonServer) -> None:
    """So that what `stop` kills is its own process group."""
    pid = own.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while own.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert start_ticks(pid) is None and Path(f"/proc/{pid}").exists()
    own.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert not list(SHARED_MEMORY.glob(f"{own._memory_prefix}*"))
    own.start()
    own.wait_ready()


def test_stopping_answers_what_was_accepted(own: TritonServer, picture: Path) -> None:
    """And ends soon afterwards."""
    codes: list[str] = []
    ended: list[float] = []

    def ask() -> None:
        with RegionClient(own.ports.grpc_url, 60, retry=False) as client:
            client.info()
            ready.wait()
            try:
                client.recognize(picture, BOX * 30, "pets")
                codes.append("answered")
            except ServingError as error:
                codes.append(error.code)
            ended.append(time.monotonic())

    ready = threading.Barrier(7)
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    ready.wait()
    time.sleep(0.2)
    own.stop()
    for thread in threads:
        thread.join()
    assert codes == ["answered"] * 6
    assert time.monotonic() - max(ended) < 10
    own.start()
    own.wait_ready()


def test_a_server_that_does_not_end_is_killed(
    own: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "EXIT_TIMEOUT_S", 1)
    assert own.pid is not None
    pids = [own.pid, *(pid for _, pid in running_stubs(own.pid))]
    os.kill(own.pid, signal.SIGSTOP)
    began = time.monotonic()
    own.stop()
    assert time.monotonic() - began < 10
    assert not any(start_ticks(pid) for pid in pids)


def test_commands_whose_reader_goes_away(own: TritonServer, tmp_path: Path) -> None:
    command = "regionspot.cli.main serve init --artifacts {} --out {}"
    words = command.format(own.repository, tmp_path / "out").split()
    for options in (words, ["regionspot.cli.main", "serve", "up", "--help"]):
        process = subprocess.Popen(
            [sys.executable, "-m", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
        process.wait()
        process.stderr.close()
        assert "Traceback" not in errors and "BrokenPipe" not in errors, errors


def test_a_stub_that_dies_before_the_server_is_ready(
    own: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton does not answer the canary then, and goes on saying that the model is ready."""
    own.stop()
    own.start()
    check = canary.check

    def kill_first(client: RegionClient, timeout_s: float, return_masks: bool = False) -> None:
        assert own.pid is not None
        for _, pid in running_stubs(own.pid):
            os.kill(pid, signal.SIGKILL)
        check(client, timeout_s, return_masks)

    with monkeypatch.context() as patch:
        patch.setattr(canary, "check", kill_first)
        began = time.monotonic()
        with pytest.raises(ServingError, match="did not get ready"):
            own.wait_ready(WAIT_S)
        assert time.monotonic() - began < WAIT_S / 2
    own.stop(drain=False)
    own.start()
    own.wait_ready()
