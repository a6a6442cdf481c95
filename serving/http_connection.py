"""Talking HTTP to a server: a pool of connections, TLS, a token, retries, and its errors as ours.

The only module that imports the HTTP client; `regionspot.serving.protocols` says what is asked.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from types import ModuleType
from typing import Any
from urllib.request import getproxies, proxy_bypass

from regionspot import __version__
from regionspot.errors import InputError
from regionspot.serving import calls
from regionspot.serving.address import Address, Credentials
from regionspot.serving.calls import Attempts, without_signals
from regionspot.serving.contract import ServingError, error_of
from regionspot.serving.http_errors import HttpReply, refusal, unusable
from regionspot.serving.protocols import HttpRequest
from regionspot.serving.tracing import trace_headers
from regionspot.serving.triton_errors import tls_failure

CONNECT_S = 5.0
IDLE_S = 60.0
"""How long a connection that nobody uses is kept. A gateway keeps it for longer, so that none is
closed under a request."""

_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
"""A host that is gone is noticed within 30 s, however long an answer may take."""


class _HttpConnector:
    """What connections of both kinds share."""

    def __init__(
        self, address: Address, timeout_s: float, retry: bool, credentials: Credentials
    ) -> None:
        credentials.check_for(address)
        self.address, self.timeout_s = address, timeout_s
        self._credentials, self._retry = credentials, retry
        self._library = _library()
        self._client: Any = None

    def _attempts(self, request: HttpRequest) -> Attempts:
        timeout_s = self.timeout_s if request.timeout_s is None else request.timeout_s
        return Attempts(timeout_s, self._retry)

    def _made_client(self, kind: Any, transport: Any) -> Any:
        limits = self._library.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_S
        )
        return kind(
            transport=transport(
                verify=self._credentials.ssl_context(),  # also of a proxy
                limits=limits,
                proxy=_proxy_for(self.address),
                socket_options=_socket_options(),
            ),
            follow_redirects=False,  # the token is for this server alone
            trust_env=False,
        )

    def _headers(self, request: HttpRequest) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": f"regionspot/{__version__}"}
        headers |= trace_headers()
        if self._credentials.token is not None:
            headers["Authorization"] = f"Bearer {self._credentials.token}"
        name = request.request_id
        if name and name.isascii() and name.isprintable():
            headers["X-Request-ID"] = name
        return headers

    def _arguments(
        self, request: HttpRequest, headers: dict[str, str], left_s: float
    ) -> dict[str, Any]:
        """Of the library's `stream`."""
        arguments: dict[str, Any] = {
            "method": "GET" if request.form is None else "POST",
            "url": f"{self.address}{request.path}",
            "headers": headers,
            "timeout": self._library.Timeout(left_s, connect=min(left_s, CONNECT_S)),
        }
        if request.form is not None:
            arguments["files"] = {"request": (None, request.form.request)}
            if request.form.image is not None:
                arguments["files"]["image"] = ("image", request.form.image)
        return arguments

    def _content(self, request: HttpRequest, status: int, headers: Any, body: bytes) -> Any:
        """The JSON of an answer. Raises ServingError for any other."""
        reply = HttpReply(self.address, request.path, status, headers, body)
        if status != 200:
            raise refusal(reply)
        try:
            return json.loads(body)
        except ValueError as error:
            raise unusable(reply) from error

    def _translated(self, error: Exception) -> ServingError:
        if isinstance(error, ServingError):
            return error
        library, host = self._library, self.address.host
        text = str(error) or type(error).__name__
        if (told := tls_failure(text, self.address)) is not None:
            return told
        if isinstance(error, library.RemoteProtocolError) and text.startswith("illegal "):
            return error_of(
                "REQUEST_INVALID",
                f"{host} does not speak HTTP: name the server's HTTP port (8000 unless told "
                f"otherwise), or write {host} if it is the gRPC port, https://{host} if it is TLS",
            )
        slow = isinstance(error, library.TimeoutException | TimeoutError)
        if slow and not isinstance(error, library.ConnectTimeout):
            return error_of(
                "TIMEOUT", f"{host} gave no answer in time: allow more, or ask for less at once"
            )
        if isinstance(error, library.TransportError | OSError):
            return error_of("UNAVAILABLE", f"{host} cannot answer at the moment ({text})")
        return error_of("INTERNAL", text)


class HttpConnection(_HttpConnector):
    """To one server, by as many connections as calls are under way. Safe to share between threads.

    Args:
        timeout_s: of each call, retries included.
        retry: ask again where that may help.
    """

    def __init__(
        self, address: Address, timeout_s: float, retry: bool, credentials: Credentials
    ) -> None:
        super().__init__(address, timeout_s, retry, credentials)
        self._lock = threading.Lock()

    def send(self, request: HttpRequest) -> Any:
        """The JSON that the server answers.

        Raises:
            ServingError: what `regionspot.serving.contract.CODES` lists.
        """
        headers = self._headers(request)
        return calls.call(
            self._attempts(request),
            lambda left_s: without_signals(lambda: self._sent(request, headers, left_s)),
            self._translated,
        )

    def _sent(self, request: HttpRequest, headers: dict[str, str], left_s: float) -> Any:
        deadline = time.monotonic() + left_s
        with self._open().stream(**self._arguments(request, headers, left_s)) as response:
            chunks = []
            for chunk in response.iter_bytes():
                if time.monotonic() > deadline:  # the library's time-out is of each chunk
                    raise TimeoutError("the answer arrives too slowly")
                chunks.append(chunk)
        return self._content(request, response.status_code, response.headers, b"".join(chunks))

    def _open(self) -> Any:
        with self._lock:
            if self._client is None:
                library = self._library
                self._client = self._made_client(library.Client, library.HTTPTransport)
            return self._client

    def close(self) -> None:
        """Closes all connections. A later call opens others."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


class AsyncHttpConnection(_HttpConnector):
    """As `HttpConnection`, for asyncio. A task that is cancelled cancels its request."""

    async def send(self, request: HttpRequest) -> Any:
        """See `HttpConnection.send`."""
        headers = self._headers(request)
        return await calls.call_async(
            self._attempts(request),
            lambda left_s: self._sent(request, headers, left_s),
            self._translated,
        )

    async def _sent(self, request: HttpRequest, headers: dict[str, str], left_s: float) -> Any:
        async with self._open().stream(**self._arguments(request, headers, left_s)) as response:
            body = await response.aread()
        return self._content(request, response.status_code, response.headers, body)

    def _open(self) -> Any:
        if self._client is None:
            library = self._library
            self._client = self._made_client(library.AsyncClient, library.AsyncHTTPTransport)
        return self._client

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


def _library() -> ModuleType:
    try:
        import httpx2
    except ImportError as error:
        raise InputError(
            f"HTTP needs a client library ({error}): pip install 'regionspot[serving]'"
        ) from error
    return httpx2


def _proxy_for(address: Address) -> str | None:
    """The proxy that the environment names for a server: none for this machine itself."""
    if address.name in ("localhost", "127.0.0.1", "::1") or proxy_bypass(address.name):
        return None
    proxies = getproxies()
    return proxies.get(address.protocol, proxies.get("all"))


def _socket_options() -> list[tuple[int, int, int]]:
    """TCP's own keepalive, as far as this system has it."""
    here = [(name, value) for name, value in _KEEPALIVE.items() if hasattr(socket, name)]
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in here),
    ]
