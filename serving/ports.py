"""The ports of a server: HTTP, gRPC and metrics, and the addresses that clients connect to."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

from regionspot.errors import InputError

METRICS_PORT = 8002


@dataclass(frozen=True)
class Ports:
    """The address and the ports that a server listens on.

    Args:
        http, grpc: 0 stands for a free port, which `resolved` chooses.
        metrics: Likewise; None stands for `METRICS_PORT`, or for a free port if that is in use.
        host: Address to listen on; 0.0.0.0 is every interface.
    """

    http: int = 8000
    grpc: int = 8001
    metrics: int | None = None
    host: str = "127.0.0.1"

    def resolved(self) -> Ports:
        """Returns the same ports, with free ones in place of 0 and None.

        Raises:
            InputError: A port is in use, or two of them are the same.
        """
        chosen: dict[str, int] = {}
        with contextlib.ExitStack() as sockets:
            for name, port in (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics)):
                listener = sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    _bind(listener, self.host, port)
                except (OSError, OverflowError) as error:
                    raise InputError(
                        f"port {port} cannot be used for {name} ({error}): another server may "
                        "listen there, `regionspot-serve down` stops ours; or choose one with "
                        f"--{name}-port"
                    ) from error
                chosen[name] = listener.getsockname()[1]
        return Ports(**chosen, host=self.host)

    @property
    def grpc_url(self) -> str:
        return f"{self._client_host}:{self.grpc}"

    @property
    def http_url(self) -> str:
        return f"http://{self._client_host}:{self.http}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._client_host}:{self.metrics}/metrics"

    @property
    def _client_host(self) -> str:
        """The address to connect to: a server that listens on every interface is reached at
        localhost.
        """
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def _bind(listener: socket.socket, host: str, port: int | None) -> None:
    """Binds to a port. None tries `METRICS_PORT`, then any free port."""
    if port is None:
        with contextlib.suppress(OSError):
            listener.bind((host, METRICS_PORT))
            return
    listener.bind((host, port or 0))
