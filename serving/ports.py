"""The ports of a server: HTTP, gRPC and metrics, and the addresses that clients connect to."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from dataclasses import dataclass

from regionspot.errors import InputError

HTTP_PORT, METRICS_PORT = 8000, 8002
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that stand for every interface -> where a client on this machine finds them."""


@dataclass(frozen=True)
class Ports:
    """The address and the ports that a server listens on.

    Args:
        http: None is no HTTP at all; 0 stands for a free port, which `resolved` chooses.
        grpc: 0 stands for a free port.
        metrics: Likewise; None stands for `METRICS_PORT`, or for a free port if that is in use.
        host: Address to listen on, of IPv4 or IPv6; 0.0.0.0 and :: are every interface.
    """

    http: int | None = None
    grpc: int = 8001
    metrics: int | None = None
    host: str = "127.0.0.1"

    def resolved(self) -> Ports:
        """Returns the same ports, with free ones in place of 0 and of None for metrics.

        Raises:
            InputError: A port is in use, or two of them are the same, or the host is no address of
                this machine.
        """
        family, address = self._address()
        wanted = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        if self.http is None:
            del wanted["http"]
        chosen: dict[str, int] = {}
        with contextlib.ExitStack() as sockets:
            for name, port in wanted.items():
                listener = sockets.enter_context(socket.socket(family, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    _bind(listener, address, port)
                except (OSError, OverflowError) as error:
                    raise InputError(
                        f"port {port} cannot be used for {name} ({error}): another server may "
                        "listen there, `regionspot-serve down` stops ours; or choose one with "
                        f"--{name}-port"
                    ) from error
                chosen[name] = listener.getsockname()[1]
        return Ports(**chosen, host=self.host)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def key(self) -> str:
        """The name of a server's files: two servers may have the same port at two addresses."""
        host = "" if self.host == Ports.host else f"{self.host.replace(':', '_')}-"
        return f"{host}{self.grpc}"

    @property
    def grpc_url(self) -> str:
        return f"{self._client_host}:{self.grpc}"

    @property
    def http_url(self) -> str:
        """Raises InputError where the server has no HTTP."""
        if self.http is None:
            raise InputError("this server has no HTTP: start it with --http-port")
        return f"http://{self._client_host}:{self.http}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._client_host}:{self.metrics}/metrics"

    @property
    def url_host(self) -> str:
        """The address to listen on as a part of an URL: that of IPv6 in brackets."""
        return _in_url(self.host)

    @property
    def _client_host(self) -> str:
        """The address to connect to: a server that listens on every interface is reached at
        localhost.
        """
        return _in_url(ANY_ADDRESS.get(self.host, self.host))

    def _address(self) -> tuple[socket.AddressFamily, str]:
        try:
            found = socket.getaddrinfo(self.host, 0, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise InputError(f"--host {self.host} is no address ({error})") from error
        family, *_, address = found[0]
        return family, str(address[0])


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind(listener: socket.socket, host: str, port: int | None) -> None:
    """Binds to a port. None tries `METRICS_PORT`, then any free port."""
    if port is None:
        with contextlib.suppress(OSError):
            listener.bind((host, METRICS_PORT))
            return
    listener.bind((host, port or 0))
