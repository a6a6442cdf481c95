"""Back-pressure and fairness: a few requests in flight, a few more waiting, a number of bytes in
memory, and the rest told at once to come back later. Callers take turns.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from regionspot.serving.gateway.errors import HttpError

MAX_RETRY_AFTER_S = 60
ROOM_WAIT_S = 30.0
"""For room in memory; the body stays with its sender until then."""

_NEWEST = 0.2  # how much the newest duration counts in the mean


@dataclass(frozen=True)
class Share:
    """Requests that are counted together: those of one caller.

    Args:
        key: the caller's name, or an address.
        max_in_flight: of its requests at the server at once.
        max_places: of its requests in the gateway at once.
        max_bytes: of its bodies in memory; a single larger one has its turn all the same.
    """

    key: str
    max_in_flight: int | None = None
    max_places: int | None = None
    max_bytes: int | None = None


EVERYBODY = Share("")


@dataclass(eq=False)
class _Waiter:
    amount: int
    most: int | None
    granted: asyncio.Future[None]


class FairPool:
    """Units that are taken and given back. Shares that wait get theirs in turn, each in the order
    of its requests; nobody is passed over because it wants much. For one event loop.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._taken: Counter[str] = Counter()
        self._waiting: dict[str, deque[_Waiter]] = {}  # the share whose turn is next comes first

    @property
    def taken(self) -> int:
        return sum(self._taken.values())

    async def take(self, key: str, amount: int = 1, most: int | None = None) -> None:
        """Waits for units, at most `most` of them for one key; cancelling gives up."""
        waiter = _Waiter(amount, most, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(key, deque()).append(waiter)
        self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled():
                self.give(key, amount)
            else:
                self._leave(key, waiter)
            raise

    @asynccontextmanager
    async def taken_by(self, key: str, amount: int, most: int | None = None) -> AsyncIterator[None]:
        """Has units for as long as the block lasts."""
        await self.take(key, amount, most)
        try:
            yield
        finally:
            self.give(key, amount)

    def give(self, key: str, amount: int = 1) -> None:
        self._taken[key] -= amount
        if not self._taken[key]:
            del self._taken[key]
        self._grant()

    def _leave(self, key: str, waiter: _Waiter) -> None:
        self._waiting[key].remove(waiter)
        if not self._waiting[key]:
            del self._waiting[key]
        self._grant()

    def _grant(self) -> None:
        while (key := self._next()) is not None:
            queue = self._waiting.pop(key)
            waiter = queue.popleft()
            if queue:  # behind all others
                self._waiting[key] = queue
            self._taken[key] += waiter.amount
            waiter.granted.set_result(None)

    def _next(self) -> str | None:
        """Whose turn it is; None where there is no room for it."""
        taken = self.taken
        for key, queue in self._waiting.items():
            waiter, own = queue[0], self._taken[key]
            if waiter.most is not None and own and own + waiter.amount > waiter.most:
                continue
            return key if not taken or taken + waiter.amount <= self._capacity else None
        return None


class Room:
    """A part of the memory for bodies."""

    def __init__(self, pool: FairPool, key: str, amount: int) -> None:
        self._pool, self._key, self.amount = pool, key, amount

    def shrink(self, amount: int) -> None:
        """Gives back what was reserved beyond `amount`."""
        spare = self.amount - amount
        if spare > 0:
            self.amount = amount
            self._pool.give(self._key, spare)


class AdmissionQueue:
    """`concurrency` requests in flight, `max_waiting` behind them, `max_bytes` of bodies in
    memory, half of them in flight: on its way to the server an image is copied several times. For
    one event loop.
    """

    def __init__(self, concurrency: int, max_waiting: int, max_bytes: int = 1 << 62) -> None:
        self._concurrency, self._places = concurrency, concurrency + max_waiting
        self._turns = FairPool(concurrency)
        self._bytes, self._sending = FairPool(max_bytes), FairPool(max_bytes // 2)
        self._held: Counter[str] = Counter()
        self._mean_s = 1.0
        self.admitted = self.in_flight = 0

    @property
    def waiting(self) -> int:
        """Requests with a place but no turn: they arrive, or wait."""
        return self.admitted - self.in_flight

    @property
    def buffered_bytes(self) -> int:
        """Of bodies in memory, or reserved for those that arrive."""
        return self._bytes.taken

    @contextmanager
    def place(self, share: Share = EVERYBODY) -> Iterator[None]:
        """Takes a place, before anything costly is done for a request.

        Raises:
            HttpError: OVERLOADED, there is none; QUOTA_EXCEEDED, the share has all of its places.
        """
        if self.admitted >= self._places:
            raise self.refusal("OVERLOADED", "too many requests wait: try again later")
        if share.max_places is not None and self._held[share.key] >= share.max_places:
            raise self.refusal(
                "QUOTA_EXCEEDED",
                f"{share.max_places} requests of this token are under way: wait for one of them",
            )
        self.admitted += 1
        self._held[share.key] += 1
        try:
            yield
        finally:
            self.admitted -= 1
            self._held[share.key] -= 1
            if not self._held[share.key]:
                del self._held[share.key]

    @asynccontextmanager
    async def room(self, share: Share, amount: int) -> AsyncIterator[Room]:
        """Waits for memory for a body of `amount` bytes.

        Raises:
            HttpError: OVERLOADED, there is none within ROOM_WAIT_S.
        """
        try:
            async with asyncio.timeout(ROOM_WAIT_S):
                await self._bytes.take(share.key, amount, share.max_bytes)
        except TimeoutError as error:
            raise self.refusal(
                "OVERLOADED", "too many images are on their way: try again later"
            ) from error
        room = Room(self._bytes, share.key, amount)
        try:
            yield room
        finally:
            room.shrink(0)

    @asynccontextmanager
    async def turn(self, share: Share = EVERYBODY, amount: int = 0) -> AsyncIterator[None]:
        """Waits until it is the turn of this request, which has a body of `amount` bytes: callers
        in turn, each first come first served.
        """
        async with (
            self._sending.taken_by(share.key, amount),
            self._turns.taken_by(share.key, 1, share.max_in_flight),
        ):
            self.in_flight += 1
            began = time.monotonic()
            try:
                yield
                self._mean_s += _NEWEST * (time.monotonic() - began - self._mean_s)
            finally:
                self.in_flight -= 1

    def retry_after_s(self) -> int:
        """Whole seconds until those who wait now have had their turn, judged by the last
        requests.
        """
        return min(
            max(math.ceil(self._mean_s * self.admitted / self._concurrency), 1), MAX_RETRY_AFTER_S
        )

    def refusal(self, code: str, message: str) -> HttpError:
        return HttpError(code, message, headers={"Retry-After": str(self.retry_after_s())})
