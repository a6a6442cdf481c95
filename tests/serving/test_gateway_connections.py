"""Connections that say nothing, or little: they do not close the gateway to others."""

from __future__ import annotations

import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from regionspot.serving.gateway import GatewaySettings
from regionspot.serving.gateway import connections as connections_module
from regionspot.serving.gateway.admission import ROOM_WAIT_S
from regionspot.serving.gateway.connections import bound_of_connections
from tests.serving.gateways import (
    GOOD,
    PICTURE,
    Gated,
    Untouched,
    ask,
    assert_refused,
    closed_port,
    head,
    metric,
    running,
    until,
)

HALF_A_HEADER = b"POST /v1/recognize HTTP/1.1\r\nHost: localhost\r\nX-A: "


def connected(client: httpx.Client, source: str = "127.0.0.1") -> socket.socket:
    address = (client.base_url.host, client.base_url.port or 0)
    return socket.create_connection(address, timeout=10, source_address=(source, 0))


def is_closed(connection: socket.socket) -> bool:
    """By the gateway. No byte may have come instead."""
    if not select.select([connection], [], [], 0)[0]:
        return False
    try:
        received = connection.recv(1)
    except ConnectionResetError:
        return True
    assert received == b""
    return True


def assert_answers(client: httpx.Client) -> None:
    """To a stranger, who opens a connection of his own. Within 10 s: tests share their machine."""
    with connected(client) as connection:
        connection.sendall(head([], "GET", "/healthz"))
        assert_refused(connection, b" 200 ", b"alive")


@contextmanager
def small_process(log: Path) -> Iterator[tuple[httpx.Client, int]]:
    """The gateway as users run it, with 128 file descriptors; a client, and the process id."""
    port = closed_port()
    command = f"{sys.executable} -m regionspot.cli.main serve web --port {port} --url 127.0.0.1:9"
    with log.open("wb") as stderr:
        process = subprocess.Popen(["bash", "-c", f"ulimit -n 128; exec {command}"], stderr=stderr)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.get("/healthz")
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline and process.poll() is None
                    time.sleep(0.1)
            yield client, process.pid
    finally:
        process.kill()
        process.wait()


def test_half_sent_headers_do_not_use_up_the_descriptors(tmp_path: Path) -> None:
    """140 of them closed a gateway of 128 descriptors for as long as they trickled, and made it
    write 4.7 MB of log a second.
    """
    with ExitStack() as stack:
        client, _ = stack.enter_context(small_process(tmp_path / "log"))
        slow = [stack.enter_context(connected(client)) for _ in range(140)]
        for connection in slow:
            connection.sendall(HALF_A_HEADER)
        began = time.monotonic()
        while time.monotonic() - began < connections_module.HEADER_S + 3:
            assert_answers(client)
            for connection in slow:
                with suppress(OSError):
                    connection.sendall(b"a")
            time.sleep(0.5)
        until(lambda: all(is_closed(connection) for connection in slow))
        assert (tmp_path / "log").stat().st_size < 10_000


def test_out_of_descriptors_for_another_reason(tmp_path: Path) -> None:
    """asyncio reports each `accept` that fails, thousands a second."""
    with ExitStack() as stack:
        client, pid = stack.enter_context(small_process(tmp_path / "log"))
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 5, used + 5))
        idle = [stack.enter_context(connected(client)) for _ in range(40)]
        for _ in range(3):
            assert_answers(client)
        assert sum(map(is_closed, idle)) >= 30
        log = (tmp_path / "log").read_text()
        assert log.count("out of file descriptors") == 1 and len(log) < 10_000


def test_the_one_that_is_idle_for_longest_is_closed_first() -> None:
    chosen = GatewaySettings("unused:1", max_connections=6)
    with running(chosen, Untouched) as client, ExitStack() as stack:
        kept = stack.enter_context(connected(client, "127.0.0.2"))
        idle = []
        for number in range(5):
            idle.append(stack.enter_context(connected(client, f"127.0.0.{number + 3}")))
            time.sleep(0.02)
        kept.sendall(head([], "GET", "/healthz"))
        assert_refused(kept, b" 200 ", b"alive")  # it has been idle for the shortest time now
        late = stack.enter_context(connected(client, "127.0.0.9"))
        until(lambda: is_closed(idle[0]))
        late.sendall(head([], "GET", "/healthz"))
        assert_refused(late, b" 200 ", b"alive")
        assert not any(map(is_closed, [kept, late, *idle[1:]]))


def test_one_address_does_not_get_all_connections() -> None:
    chosen = GatewaySettings("unused:1", max_connections=8, trusted_proxies=("127.0.0.3",))
    with running(chosen, Untouched) as client, ExitStack() as stack:
        other = stack.enter_context(connected(client, "127.0.0.9"))
        time.sleep(0.05)
        many = [stack.enter_context(connected(client, "127.0.0.2")) for _ in range(7)]
        until(lambda: sum(map(is_closed, many)) == 3)
        assert not is_closed(other)  # although it is the oldest
        proxied = [stack.enter_context(connected(client, "127.0.0.3")) for _ in range(6)]
        time.sleep(0.3)
        assert not any(map(is_closed, proxied))


def test_connections_that_work_are_not_closed_for_others() -> None:
    fake = Gated()
    chosen = GatewaySettings("unused:1", concurrency=4, max_connections=4)
    with (
        running(chosen, lambda *_: fake) as client,
        ThreadPoolExecutor(4) as pool,
        httpx.Client(base_url=client.base_url, timeout=30) as second,
    ):
        answers = [pool.submit(ask, second, PICTURE, **GOOD) for _ in range(2)]
        until(lambda: fake.asked == 2)
        for _ in range(5):  # the address has two more, and they are busy as well
            with connected(client) as late:
                until(lambda late=late: is_closed(late))  # type: ignore[misc]
        fake.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert_answers(client)


@pytest.fixture
def short_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "HEADER_S", 0.5)
    monkeypatch.setattr(connections_module, "SWEEP_S", 0.1)


@pytest.mark.usefixtures("short_header")
@pytest.mark.parametrize("first", [b"", HALF_A_HEADER, head([], "GET", "/healthz")])
def test_a_header_has_a_deadline(first: bytes) -> None:
    with running(GatewaySettings("unused:1"), Untouched) as client, connected(client) as slow:
        slow.sendall(first)
        if first.endswith(b"\r\n\r\n"):
            assert_refused(slow, b" 200 ", b"alive")
            time.sleep(1)
            assert not is_closed(slow)  # it may wait between requests
            slow.sendall(HALF_A_HEADER)
        began = time.monotonic()
        while not is_closed(slow):
            assert time.monotonic() - began < 5
            if first:
                try:
                    slow.sendall(b"a")
                except OSError:
                    break
            time.sleep(0.05)
        assert 0.3 < time.monotonic() - began < 3
        assert metric(client, "connections") == 1


@pytest.mark.usefixtures("short_header")
def test_a_question_takes_longer_than_a_header_may() -> None:
    fake = Gated()
    with (
        running(GatewaySettings("unused:1"), lambda *_: fake) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(ask, client, PICTURE, **GOOD)
        time.sleep(1.2)
        fake.gate.set()
        assert answer.result().status_code == 200


def test_an_answer_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold its memory for ever."""
    monkeypatch.setattr(connections_module, "SWEEP_S", 0.1)
    monkeypatch.setattr("regionspot.serving.gateway.serve.UPLOAD_TIMEOUT_S", 1 - ROOM_WAIT_S)
    monkeypatch.setattr("regionspot.serving.gateway.serve.SEND_S", 0)
    chosen = GatewaySettings("unused:1", timeout_s=0.1)
    with running(chosen, Untouched) as client, connected(client) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(head([], "GET", "/static/style.css") * 800)
        until(lambda: metric(client, "connections") == 2)
        until(lambda: metric(client, "connections") == 1)


def test_the_bound_keeps_clear_of_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    limits = {"soft": 1024, "hard": 1024}
    resource = connections_module.resource
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, found: raised.append(found))
    assert bound_of_connections(1024) == 1024 - 80
    limits["hard"] = 1 << 20
    assert bound_of_connections(1024) == 1024 and raised[-1][0] == 1104
    limits["soft"] = limits["hard"] = 128
    assert bound_of_connections(1024) == 48
    limits["soft"] = limits["hard"] = 64
    assert bound_of_connections(1024) == 16
