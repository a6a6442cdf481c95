"""Gateways that tests talk to, and model servers that do as they are told."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from regionspot.serving.contract import Limits
from regionspot.serving.conversation import ServerInfo
from regionspot.serving.gateway import GatewaySettings, make_app, make_server
from regionspot.serving.messages import Answer, RemoteImage
from regionspot.structures import RegionPredictions


def encoded(width: int = 40, height: int = 30, file_format: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


WORDS = ["plain green toy", "red toy with blue stripes", "cyan toy with red stripes"]
PICTURE = encoded()
BOX = [[1, 1, 20, 20]]
GOOD: dict[str, Any] = {"boxes": BOX, "words": ["cat", "dog"]}


@contextmanager
def running(
    chosen: GatewaySettings, connect: Callable[[str, float], Any] | None = None
) -> Iterator[httpx.Client]:
    """The gateway in a real HTTP server on a free port, and a client of it."""
    server, listener = make_server(chosen, app=make_app(chosen, connect))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = listener.getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)


def ask(
    client: httpx.Client,
    image: bytes | None = None,
    headers: dict[str, str] | None = None,
    **question: Any,
) -> Any:
    """A question as a form; without a picture where `image` is None. NaN passes, as from a careless
    caller.
    """
    files: dict[str, Any] = {"request": (None, json.dumps(question))}
    if image is not None:
        files["image"] = ("toys.jpg", image)
    return client.post("/v1/recognize", files=files, headers=headers)


def error_in(response: httpx.Response, status: int, code: str) -> str:
    """The message of an error, whose form, status and discretion are checked."""
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"code", "message", "request_id"}
    assert response.headers["x-request-id"] == response.json()["error"]["request_id"]
    message = str(response.json()["error"]["message"])
    for secret in ("Traceback", "Error(", ".py", "127.0.0.1", "site-packages", str(Path.cwd())):
        assert secret not in response.text
    return message


class Untouched:
    """A client of a server that must not be asked."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.asked = 0

    async def info(self, refresh: bool = False) -> ServerInfo:
        return ServerInfo("fake", "none", "fp32", {}, Limits())

    async def ask(self, *arguments: Any, **options: Any) -> Answer:
        raise AssertionError("the model server was asked")

    async def close(self) -> None: ...


@contextmanager
def raw(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection(
        (client.base_url.host, client.base_url.port or 0), timeout=10
    ) as connection:
        yield connection


def head(lines: list[str], method: str = "POST", path: str = "/v1/recognize") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def assert_refused(connection: socket.socket, *parts: bytes) -> None:
    answer = b""
    while not all(part in answer for part in parts):
        received = connection.recv(65536)
        assert received, answer
        answer += received


class Gated(Untouched):
    """A server that answers when it is let."""

    def __init__(self, url: str = "", timeout_s: float = 0) -> None:
        super().__init__(url, timeout_s)
        self.gate = threading.Event()
        self.cancelled = 0

    async def ask(self, *arguments: Any, **options: Any) -> Answer:
        self.asked += 1
        try:
            while not self.gate.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        none = np.zeros((0, 1), np.float32)
        found = RegionPredictions(
            3,
            4,
            none.reshape(0, 4),
            ("cat",),
            none[:, 0],
            none[:, 0].astype(int),
            none.astype(int),
            none,
        )
        return Answer(found, RemoteImage("handle", 3, 4), False)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith(f"regionspot_gateway_{name}")
    )


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Moody(Gated):
    """A server that fails as it is told, and counts how often it is asked what it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate.set()
        self.failure: Exception | None = None
        self.infos = 0

    async def info(self, refresh: bool = False) -> ServerInfo:
        self.infos += 1
        return await super().info()

    async def ask(self, *arguments: Any, **options: Any) -> Answer:
        if self.failure is not None:
            raise self.failure
        return await super().ask(*arguments, **options)


def log_lines(captured: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in captured.readouterr().err.splitlines()
        if line.startswith('{"time"')
    ]
