"""What stands between a client and a server: TLS, gateways, proxies that say or lose things."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import uvicorn

from regionspot.serving.gateway import GatewaySettings, make_app
from regionspot.serving.gateway.serve import server_options

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True)
class Certificates:
    """An authority, and a server's and a client's certificate of it."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        """`ca`, `server_key`, `other_ca`...: a PEM file."""
        return self.folder / f"{name}.pem"

    @property
    def client_files(self) -> dict[str, Any]:
        """All that a client is given where it needs a certificate of its own."""
        return {
            "ca_file": self.ca,
            "client_cert_file": self.client,
            "client_key_file": self.client_key,
        }


def make_certificates(folder: Path) -> Certificates:
    """For 127.0.0.1 and localhost; `other_ca` is an authority that signed nothing."""
    made = Certificates(folder)
    for name in ("ca", "other_ca"):
        _openssl(
            *("req", "-x509", *KEY, "-keyout", made.folder / f"{name}_key.pem"),
            *("-out", made.folder / f"{name}.pem", "-subj", f"/CN={name}"),
        )
    names = folder / "names.ext"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        request, key = folder / f"{name}.csr", folder / f"{name}_key.pem"
        _openssl("req", *KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        _openssl(
            *("x509", "-req", "-in", request, "-CA", made.ca, "-CAkey", made.ca_key),
            *("-CAcreateserial", "-out", folder / f"{name}.pem", "-extfile", names),
        )
    return made


def _openssl(*words: Any) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@contextmanager
def gateway(
    settings: GatewaySettings, certificates: Certificates | None = None, prefix: str = ""
) -> Iterator[str]:
    """The real gateway on a free port; its address. An ingress may stand before it: TLS, and a
    path that is taken off.
    """
    options = server_options(settings)
    if certificates is not None:
        options |= {
            "ssl_certfile": str(certificates.server),
            "ssl_keyfile": str(certificates.server_key),
        }
    app: Any = make_app(settings)
    if prefix:
        app = _below(prefix, app)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"{'https' if certificates else 'http'}://127.0.0.1:{port}{prefix}"
    finally:
        server.should_exit = True
        thread.join(20)


def _below(prefix: str, app: Any) -> Any:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith(prefix), scope["path"]
            scope = scope | {"path": scope["path"].removeprefix(prefix)}
        await app(scope, receive, send)

    return inner


class Listener:
    """A TCP server on a free port whose connections are each handled in a thread."""

    def __init__(self, handle: Callable[[socket.socket], None]) -> None:
        self._handle = handle
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.accepted += 1
                self._open.append(connection)
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with suppress(OSError):
            self._handle(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for open_socket in (self._socket, *self._open):
            with suppress(OSError):
                open_socket.close()


class Canned(Listener):
    """An HTTP server that says one of its answers to each request, the last one for ever, and keeps
    what it is sent.
    """

    def __init__(self, answers: Sequence[bytes]) -> None:
        self.answers, self.requests = list(answers), list[bytes]()
        super().__init__(self._answer)

    def _answer(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            if not (more := connection.recv(1 << 16)):
                return
            request += more
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_RDWR)


def http_answer(status: int, body: bytes, kind: str = "text/html", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


class Forwarder(Listener):
    """Passes bytes on to another port; `silence` makes it pass on none of the connections that are
    open, as a node that has vanished.

    Args:
        context: takes TLS from clients, and speaks without it behind.
    """

    def __init__(self, target: str, context: ssl.SSLContext | None = None) -> None:
        name, _, port = target.rpartition(":")
        self._target, self._context = (name, int(port)), context
        self._is_silent = threading.Event()
        super().__init__(self._forward)

    def silence(self) -> None:
        """Those that come later are passed on."""
        self._is_silent.set()
        self._is_silent = threading.Event()

    def _forward(self, outer: socket.socket) -> None:
        if self._context is not None:
            outer = self._context.wrap_socket(outer, server_side=True)
        inner = socket.create_connection(self._target)
        self._open += [outer, inner]
        silent = self._is_silent
        threading.Thread(target=_pass_on, args=(inner, outer, silent), daemon=True).start()
        _pass_on(outer, inner, silent)


def _pass_on(source: socket.socket, target: socket.socket, silent: threading.Event) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if silent.is_set():
                threading.Event().wait()  # neither an answer nor an end
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def server_context(certificates: Certificates, mutual: bool = False) -> ssl.SSLContext:
    """Of a server of these certificates: with `mutual` it lets in only clients that have one."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.ca)
    context.load_cert_chain(certificates.server, certificates.server_key)
    context.set_alpn_protocols(["h2", "http/1.1"])
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
    return context
