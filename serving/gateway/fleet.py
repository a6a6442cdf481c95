"""The model servers behind a gateway: which of them is asked about an image.

A server keeps the images that it has encoded, so the same image goes to the same server: by
rendezvous hashing, which moves only the images of a server that comes or goes. A server that has
much more to do than the others is passed over, unless it is asked about an image by its handle.

A second release of the model, the canary, gets a share of the images, always the same ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from regionspot.serving import canary
from regionspot.serving.address import Address
from regionspot.serving.calls import Attempts
from regionspot.serving.contract import RequestError, ServingError
from regionspot.serving.conversation import ServerInfo
from regionspot.serving.gateway.settings import GatewaySettings
from regionspot.serving.gateway.tracing import server_span
from regionspot.serving.gateway.upstream import Connect, State, Upstream, connector
from regionspot.serving.messages import Answer, Question, handle_of
from regionspot.structures import Prompts

RESOLVE_S = 5.0
"""How long the addresses of a name are believed."""

RIDE_S = 10.0
"""How long a request is tried again with servers that cannot be reached: a restart takes less."""

WATCH_S = 5.0
"""How often servers are looked at that nobody asks."""

FULL = 1.25
"""A server that has this many times the requests of the average one is passed over."""

Make = Callable[[str, str | None], Upstream]
ResultT = TypeVar("ResultT")


class Fleet:
    """All servers. They need not be up: they are first asked when a request comes."""

    def __init__(self, settings: GatewaySettings, connect: Connect | None = None) -> None:
        connecting = connector(settings.upstream_tls) if connect is None else connect

        def make(url: str, server_name: str | None) -> Upstream:
            named = {} if server_name is None else {"server_name": server_name}
            return Upstream(url, settings.timeout_s, partial(connecting, **named))

        self._stable = Group(settings.url.split(","), make)
        self._canary = None
        if settings.canary_url is not None:
            self._canary = Group(settings.canary_url.split(","), make)
        self._canary_share = settings.canary_share

    @property
    def state(self) -> State:
        """ "up" where any server of the stable release answers."""
        states = {member.upstream.health.state for member in self._stable.members}
        return "up" if "up" in states else "down" if "down" in states else "unknown"

    @property
    def members(self) -> list[Member]:
        """All of both releases."""
        return [member for group in self._groups() for member in group.members]

    async def info(self) -> ServerInfo:
        """What a server of the stable release runs; see `Upstream.info`."""
        return await self._first(lambda upstream: upstream.info())

    async def ask(self, question: Question, request_id: str, timeout_s: float) -> Answer:
        """Asks the server that has the image, or should have it; others where that one cannot be
        reached, and all again for RIDE_S.

        Raises:
            ServingError: as `AsyncRegionClient.ask`.
        """
        deadline = time.monotonic() + timeout_s
        attempts = Attempts(min(RIDE_S, timeout_s))
        for group in self._groups():
            await group.resolve()
        key = "" if len(self.members) == 1 else await _key_of(question)
        while True:
            try:
                return await self._ask_each(
                    self._ranked(question, key), question, request_id, deadline
                )
            except RequestError:
                raise
            except ServingError as error:
                # too much to do is for the caller to know, and to wait for
                if error.code == "OVERLOADED":
                    raise
                await asyncio.sleep(attempts.delay_after(error))

    async def teach(self, words: Sequence[str]) -> None:
        """Has every server encode words, which it then keeps.

        Raises:
            ServingError: one of them could not.
        """
        prompts = (Prompts.from_boxes([canary.BOX]),)
        question = Question(canary.picture(), tuple(words), prompts, top_k=1)
        for group in self._groups():
            await group.resolve()
        asked = [member.ask(question, "words", math.inf) for member in self.members]
        for result in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def check(self) -> None:
        """Returns if a server of the stable release answers; see `Upstream.check`."""
        await self._first(lambda upstream: upstream.check())

    async def watch(self) -> None:
        """Looks at the servers now and then, for as long as nobody asks them. Never returns."""
        while True:
            for group in self._groups():
                await group.resolve()
            await asyncio.gather(*(member.upstream.look(WATCH_S) for member in self.members))
            await asyncio.sleep(WATCH_S)

    async def close(self) -> None:
        for group in self._groups():
            await group.close()

    async def _first(self, ask: Callable[[Upstream], Awaitable[ResultT]]) -> ResultT:
        """What the first server of the stable release says that does not fail. Raises as the
        last.
        """
        await self._stable.resolve()
        *others, last = sorted(self._stable.members, key=_is_down)
        for member in others:
            with suppress(ServingError):
                return await ask(member.upstream)
        return await ask(last.upstream)

    def _groups(self) -> list[Group]:
        return [self._stable] if self._canary is None else [self._stable, self._canary]

    def _ranked(self, question: Question, key: str) -> list[Member]:
        """The servers in the order in which they are asked: those of the image's release first."""
        groups = self._groups()
        if self._canary is not None and _fraction(f"release {key}") < self._canary_share:
            groups.reverse()
        else:
            groups = groups[:1]  # a canary takes no more than its share
        spread = isinstance(question.image, bytes)
        return [member for group in groups for member in group.ranked(key, spread)]

    async def _ask_each(
        self, members: Sequence[Member], question: Question, request_id: str, deadline: float
    ) -> Answer:
        """Asks one after another until one answers."""
        by_handle = not isinstance(question.image, bytes)
        for member in members[:-1]:
            try:
                return await member.ask(question, request_id, deadline)
            except ServingError as error:
                # the image may lie elsewhere: its server was full, or is new
                elsewhere = error.code == "IMAGE_UNKNOWN" and by_handle
                if error.code != "UNAVAILABLE" and not elsewhere:
                    raise
        return await members[-1].ask(question, request_id, deadline)


class Member:
    """A server, and how many requests of this gateway it has."""

    def __init__(self, url: str, server_name: str | None, upstream: Upstream) -> None:
        self.url, self.server_name, self.upstream = url, server_name, upstream
        self.in_flight = 0

    async def ask(self, question: Question, request_id: str, deadline: float) -> Answer:
        """See `Upstream.ask`."""
        self.in_flight += 1
        try:
            left_s = deadline - time.monotonic()
            timeout_s = None if left_s == math.inf else max(left_s, 0.001)
            with server_span(self.url) as span:
                answer = await self.upstream.ask(question, request_id, timeout_s)
                span.show(answer)
                return answer
        finally:
            self.in_flight -= 1


class Group:
    """The servers of one release.

    Args:
        urls: a name that stands for several addresses stands for a server at each.
        make: makes the client of one, from its URL and the name in its certificate, None where
            that is the URL's.
    """

    def __init__(self, urls: Sequence[str], make: Make) -> None:
        self._urls, self._make = [url.strip() for url in urls], make
        self._members = {url: Member(url, None, make(url, None)) for url in self._urls}
        self._leaving: list[Member] = []
        self._resolved_at = -math.inf
        self._lock = asyncio.Lock()

    @property
    def members(self) -> list[Member]:
        """One or more."""
        return list(self._members.values())

    async def resolve(self) -> None:
        """Looks up the names again, once they are RESOLVE_S old. A name that is not found keeps the
        addresses that it had.
        """
        if time.monotonic() - self._resolved_at < RESOLVE_S:
            return
        async with self._lock:
            if time.monotonic() - self._resolved_at < RESOLVE_S:
                return
            found = [await _servers_at(url) for url in self._urls]
            self._resolved_at = time.monotonic()
            if all(found):
                self._replace({url: name for servers in found for url, name in servers.items()})
            await self._close_leaving()

    def ranked(self, key: str, spread: bool) -> list[Member]:
        """The servers, the one of the image first; those that are down last.

        Args:
            spread: whether another may take it while the first is full.
        """
        ranked = sorted(self.members, key=lambda member: _hash(f"{key} {member.url}"))
        if spread:
            total = sum(member.in_flight for member in ranked)
            most = math.ceil(FULL * (total + 1) / len(ranked))
            ranked.sort(key=lambda member: member.in_flight >= most)
        return sorted(ranked, key=_is_down)

    async def close(self) -> None:
        for member in (*self._members.values(), *self._leaving):
            await member.upstream.close()

    def _replace(self, servers: Mapping[str, str | None]) -> None:
        known = self._members
        kept = {
            url: one
            for url, one in known.items()
            if url in servers and one.server_name == servers[url]
        }
        self._leaving += [one for url, one in known.items() if url not in kept]
        self._members = {
            url: kept.get(url) or Member(url, name, self._make(url, name))
            for url, name in servers.items()
        }

    async def _close_leaving(self) -> None:
        for member in [one for one in self._leaving if not one.in_flight]:
            self._leaving.remove(member)
            await member.upstream.close()


async def _servers_at(url: str) -> dict[str, str | None]:
    """The URL of each address that a name stands for, sorted, and over TLS that name, which the
    certificates are for; nothing where it is not found.
    """
    address = Address.parse(url)
    if not address.is_grpc:
        return {url: None}
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(address.name, address.port, type=socket.SOCK_STREAM)
    except OSError:
        return {}
    hosts = sorted({str(place[0]) for *_, place in found})
    if len(hosts) == 1:
        return {url: None}
    protocol, name = ("grpcs://", address.name) if address.is_tls else ("", None)
    places = [f"[{host}]" if ":" in host else host for host in hosts]
    return {f"{protocol}{place}:{address.port}": name for place in places}


async def _key_of(question: Question) -> str:
    """What places an image: its handle."""
    image = question.image
    if not isinstance(image, bytes):
        return image.handle
    return await asyncio.to_thread(handle_of, image)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _fraction(text: str) -> float:
    """From 0 to 1, evenly."""
    return int.from_bytes(_hash(text)[:8], "big") / 2**64


def _is_down(member: Member) -> bool:
    return member.upstream.health.state == "down"
