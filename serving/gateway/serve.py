"""The gateway in an HTTP server: its socket, its TLS, its end."""

from __future__ import annotations

import ctypes
import logging
import math
import signal
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from regionspot.errors import InputError
from regionspot.logs import JsonFormatter, log_to
from regionspot.serving.gateway.admission import ROOM_WAIT_S
from regionspot.serving.gateway.app import UPLOAD_TIMEOUT_S, make_app
from regionspot.serving.gateway.connections import (
    Connections,
    Listener,
    bound_of_connections,
    protocol_of,
)
from regionspot.serving.gateway.settings import GatewaySettings, TlsFiles
from regionspot.serving.gateway.sites import Proxies, is_loopback
from regionspot.serving.gateway.tracing import export_to

IDLE_S = 75
"""Before an idle connection is closed. Longer than clients and proxies keep one: who closes second
meets no request.
"""
SEND_S = 60.0
"""For an answer to be taken."""

LIBRARIES = ("opentelemetry", "uvicorn")
"""Their warnings are lines of JSON, too."""

MMAP_THRESHOLD = 1 << 20
_M_MMAP_THRESHOLD = -3  # malloc.h
logger = logging.getLogger(__name__)


def run(settings: GatewaySettings, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serves until SIGINT or SIGTERM; then takes no more requests, and finishes those under way
    within `timeout_s`.

    Raises:
        InputError: an address that is taken or none of this machine's; one that others reach,
            where nobody needs a token, without `allow_anonymous`; files of TLS that cannot be
            used; traces without OpenTelemetry's SDK.
    """
    check_reach(settings, host)
    _return_large_blocks()
    server, listener = make_server(settings, host, port)
    # it warns of what is wrong with a caller's header, and quotes it
    logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
    # uvicorn raises the signal that ended it again, which by default ends the process at once
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        log_to("stderr", JsonFormatter(), LIBRARIES),
        export_to(settings.otlp_endpoint),
        suppress(KeyboardInterrupt),
    ):
        server.run(sockets=[listener])


def make_server(
    settings: GatewaySettings,
    host: str = "127.0.0.1",
    port: int = 0,
    app: Starlette | None = None,
) -> tuple[uvicorn.Server, Listener]:
    """A server that is not running yet, and the socket to run it with; port 0 is a free one.

    Raises:
        InputError: see `run`.
    """
    app = make_app(settings) if app is None else app
    most = bound_of_connections(settings.max_connections)
    connections = Connections(
        most,
        most_per_address=max(most // 2, 1),
        is_exempt=Proxies(settings.trusted_proxies).trusts,
        busy_s=ROOM_WAIT_S + UPLOAD_TIMEOUT_S + settings.timeout_s + SEND_S,
    )
    app.state.gateway.show_connections(connections)
    config = uvicorn.Config(app, **server_options(settings), http=protocol_of(connections))
    refresh = _load_tls(config, settings.tls)
    if refresh is not None:
        app.state.gateway.refresh_also(refresh)
    try:
        listener = Listener.on(host, port, connections)
    except OSError as error:
        raise InputError(
            f"the gateway cannot listen on {host}, port {port}: {error.strerror or error}"
        ) from error
    return uvicorn.Server(config), listener


def server_options(settings: GatewaySettings) -> dict[str, Any]:
    """uvicorn's options."""
    tls = settings.tls
    options: dict[str, Any] = {
        "access_log": False,
        "log_config": None,  # by default it closes the handlers of whoever runs the gateway
        "log_level": "error",  # anybody can cause its warnings
        "loop": "asyncio",  # whose accept is Listener's
        "proxy_headers": False,  # it believes whoever is on this machine
        "server_header": False,
        "timeout_keep_alive": IDLE_S,
        "timeout_graceful_shutdown": math.ceil(settings.timeout_s) + 1,
        "ws": "none",
    }
    if tls.cert is not None:
        options |= {"ssl_certfile": tls.cert, "ssl_keyfile": tls.key}
    if tls.ca is not None:
        options |= {"ssl_ca_certs": str(tls.ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def check_reach(settings: GatewaySettings, host: str) -> None:
    """Raises InputError where others could ask a gateway that wants no token."""
    if settings.anonymous and not is_loopback(host) and not settings.allow_anonymous:
        raise InputError(
            f"on {host}, everybody who reaches this machine could use the model: give --tokens or "
            "--token-file, or --allow-anonymous if that is meant"
        )


def _load_tls(config: uvicorn.Config, files: TlsFiles) -> Callable[[], None] | None:
    """Has uvicorn read its certificate; what reads it again once it has changed."""
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"the gateway's certificate or key cannot be used: {error}") from error
    context = config.ssl
    if context is None or files.cert is None or files.key is None:
        return None
    cert, key = files.cert, files.key
    seen = [_stamp(cert, key)]

    def refresh() -> None:
        stamp = _stamp(cert, key)
        if stamp == seen[0]:
            return
        seen[0] = stamp
        try:
            context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            logger.warning(f"the certificate of before is kept: {error}")
        else:
            logger.info(f"{cert} was read again")

    return refresh


def _stamp(*paths: Path) -> tuple[int, ...] | None:
    try:
        found = [path.stat() for path in paths]
    except OSError:
        return None
    return tuple(number for one in found for number in (one.st_mtime_ns, one.st_ino))


def _return_large_blocks() -> None:
    """Has glibc take blocks of images from the system and give them back, as it does for the first
    ones; by itself it keeps later ones on its heap, which grows by their gaps.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
