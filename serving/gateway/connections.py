"""Open connections: a bound of their number, and deadlines for those that say nothing.

uvicorn has neither. A few hundred connections that are opened and left, or that send a byte of
their header now and then, would take all file descriptors, and asyncio then reports each failed
`accept` in a loop. So sockets are counted where they are accepted, before anything is read and
before TLS is spoken: beyond the bound, the connection that has been idle for longest is closed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0
"""From when a connection is opened, or a request's first byte has come, to the end of its header;
TLS included.
"""
SWEEP_S = 1.0
SPARE_DESCRIPTORS = 64
"""For everything but callers: gRPC, files, libraries."""

CLOSING_AT_ONCE = 16
"""Connections that are being closed beside those that are open."""

ACCEPT_WARNING_S = 60.0
logger = logging.getLogger(__name__)


class Connection(socket.socket):
    """A caller's socket, from `accept` to `close`.

    Args:
        busy: whether a request is being read or answered.
        since: when that began.
        header_since: when the header of the next request began, None between requests.
    """

    pool: Connections
    address: str
    busy = False
    is_closing = False
    since: float
    header_since: float | None

    def close(self) -> None:
        self.pool.forget(self)
        super().close()

    def cut(self) -> None:
        """Ends it whatever its transport does; that sees the end, and closes."""
        self.is_closing = True
        with suppress(OSError):  # its caller has ended it
            self.shutdown(socket.SHUT_RDWR)


class Connections:
    """All that are open. For one event loop.

    Args:
        most: open at once.
        most_per_address: of one address.
        is_exempt: tells addresses that stand for many callers, such as proxies.
        busy_s: how long a request may take, all in all.
    """

    def __init__(
        self,
        most: int,
        most_per_address: int,
        is_exempt: Callable[[str], bool] = lambda address: False,
        busy_s: float = 600.0,
    ) -> None:
        self._most, self._most_per_address = most, most_per_address
        self._is_exempt, self._busy_s = is_exempt, busy_s
        self._open: dict[int, Connection] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self.closed_early = self.refused = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_crowded(self) -> bool:
        """Whether those that are being closed must be closed first."""
        return len(self._open) >= self._most + CLOSING_AT_ONCE

    def of(self, transport: asyncio.BaseTransport) -> Connection | None:
        found = transport.get_extra_info("socket")
        return None if found is None else self._open.get(found.fileno())

    def admit(self, accepted: socket.socket, address: str) -> Connection | None:
        """The connection, or None where there is no room for it: it is closed."""
        alive = [one for one in self._open.values() if not one.is_closing]
        own = [one for one in alive if one.address == address]
        room = len(alive) < self._most or self._close_oldest(alive)
        if room and len(own) >= self._most_per_address and not self._is_exempt(address):
            room = self._close_oldest(own)
        if not room:
            self.refused += 1
            accepted.close()
            return None
        kind = accepted.family, accepted.type, accepted.proto
        connection = Connection(*kind, fileno=accepted.detach())
        connection.pool, connection.address = self, address
        connection.since = connection.header_since = time.monotonic()
        self._open[connection.fileno()] = connection
        if self._sweeper is None:
            self._sweep_later()
        return connection

    def forget(self, connection: Connection) -> None:
        if self._open.get(connection.fileno()) is connection:
            del self._open[connection.fileno()]

    def close_one(self) -> bool:
        """Closes the connection that has been idle for longest; whether there was one."""
        return self._close_oldest([one for one in self._open.values() if not one.is_closing])

    def _close_oldest(self, among: list[Connection]) -> bool:
        idle = [one for one in among if not one.busy and not one.is_closing]
        if not idle:
            return False
        min(idle, key=lambda one: one.since).cut()
        self.closed_early += 1
        return True

    def _sweep_later(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Closes those that are late."""
        self._sweeper = None
        now = time.monotonic()
        for one in list(self._open.values()):
            if not one.is_closing and self._is_late(one, now):
                self.closed_early += 1
                one.cut()
        if self._open:
            self._sweep_later()

    def _is_late(self, one: Connection, now: float) -> bool:
        if one.busy:
            return now - one.since > self._busy_s
        return one.header_since is not None and now - one.header_since > HEADER_S


class Listener(socket.socket):
    """A socket that listens, and gives each connection to `Connections` first."""

    connections: Connections
    _spare: int | None = None
    _warned_at = -ACCEPT_WARNING_S

    @classmethod
    def on(cls, host: str, port: int, connections: Connections) -> Listener:
        """Bound to an address.

        Raises:
            OSError: it is taken, or none of this machine's.
        """
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = cls(family, kind, protocol)
        listener.connections = connections
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        listener._spare = os.open(os.devnull, os.O_RDONLY)
        return listener

    def accept(self) -> tuple[socket.socket, Any]:
        """As asyncio calls it: BlockingIOError has it come back in the next turn of the loop."""
        if self.connections.is_crowded:
            raise BlockingIOError
        try:
            accepted, address = super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._make_room()
            raise BlockingIOError from error
        connection = self.connections.admit(accepted, str(address[0]))
        if connection is None:
            raise ConnectionAbortedError
        return connection, address

    def close(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        super().close()

    def _make_room(self) -> None:
        """Out of file descriptors. Closes a connection, or else the one that waits, for which a
        spare descriptor is kept.
        """
        if time.monotonic() - self._warned_at > ACCEPT_WARNING_S:
            self._warned_at = time.monotonic()
            logger.warning("out of file descriptors: idle connections are closed")
        if self.connections.close_one() or self._spare is None:
            return
        os.close(self._spare)
        self._spare = None
        try:
            super().accept()[0].close()
            self.connections.refused += 1
        except OSError:
            pass
        finally:
            self._spare = os.open(os.devnull, os.O_RDONLY)


def protocol_of(connections: Connections) -> type[H11Protocol]:
    """uvicorn's protocol, which tells `connections` what each of them does."""

    class GuardedProtocol(H11Protocol):
        _connection: Connection | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._connection = connections.of(transport)

        def data_received(self, data: bytes) -> None:
            one = self._connection
            if one is not None and not one.busy and one.header_since is None:
                one.header_since = time.monotonic()
            super().data_received(data)
            self._note()

        def on_response_complete(self) -> None:
            self._note(done=True)
            super().on_response_complete()
            self._note()

        def _note(self, done: bool = False) -> None:
            one = self._connection
            if one is None:
                return
            busy = not done and self.cycle is not None and not self.cycle.response_complete
            if busy != one.busy:
                one.busy, one.since, one.header_since = busy, time.monotonic(), None

    return GuardedProtocol


def allow_descriptors(wanted: int) -> int:
    """Raises the limit of file descriptors if it is below `wanted` and may be raised; the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def bound_of_connections(most: int) -> int:
    """How many of `most` connections there may be, given the limit of file descriptors."""
    allowed = allow_descriptors(most + CLOSING_AT_ONCE + SPARE_DESCRIPTORS)
    return min(most, max(allowed - CLOSING_AT_ONCE - SPARE_DESCRIPTORS, allowed // 4, 1))
