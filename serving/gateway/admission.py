"""Back-pressure: a few requests in flight, a few more waiting, and the rest told at once to come
back later.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from regionspot.serving.gateway.errors import HttpError

MAX_RETRY_AFTER_S = 60
_NEWEST = 0.2  # how much the newest duration counts in the mean


class AdmissionQueue:
    """`concurrency` requests in flight and `max_waiting` behind them. For one event loop."""

    def __init__(self, concurrency: int, max_waiting: int) -> None:
        self._concurrency, self._places = concurrency, concurrency + max_waiting
        self._free = asyncio.Semaphore(concurrency)
        self._mean_s = 1.0
        self.admitted = self.in_flight = self.shed = 0

    @property
    def waiting(self) -> int:
        """Requests with a place but no turn: they arrive, or wait."""
        return self.admitted - self.in_flight

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take a place, before anything costly is done for a request.

        Raises:
            HttpError: OVERLOADED; there is none.
        """
        if self.admitted >= self._places:
            self.shed += 1
            raise HttpError(
                "OVERLOADED",
                "too many requests wait: try again later",
                headers={"Retry-After": str(self.retry_after_s())},
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until it is this request's turn, first come first served."""
        async with self._free:
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
