"""The two loops that send load, and what is counted of them.

Closed loop: C workers, each of which asks again once it was answered. It finds the most that the
server can do; the latencies are those of clients who wait for it. Open loop: requests come at their
own times, a Poisson process of a given rate, whether earlier ones were answered or not. Their
latency counts from when each was due, so that a server, or a client, that falls behind cannot hide
it (no "coordinated omission").
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.serving.contract import ServingError

SATURATED_BELOW = 0.95
ENOUGH = 20
"""Of fewer requests chance alone says whether a server kept up."""

MAX_IN_FLIGHT = 256
ERROR_PAUSE_S = 0.05
"""So that a server which refuses at once is not asked thousands of times a second."""

Ask = Callable[[], Awaitable[bool]]
"""Sends one request; whether the server knew the picture. Raises ServingError."""


@dataclass
class Tally:
    """What became of a step's requests, times in seconds: `latencies`, `answered` since the step
    began, and `late`, how much later than due each was sent.
    """

    began: float = field(default_factory=time.perf_counter)
    latencies: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    not_sent: int = 0
    in_flight: int = 0

    @property
    def due(self) -> int:
        """All requests that there were."""
        return len(self.latencies) + sum(self.codes.values()) + self.not_sent

    async def count(self, ask: Ask, due: float) -> bool:
        """Ask once, a request of the time `due`; whether it was answered."""
        self.late.append(time.perf_counter() - due)
        self.in_flight += 1
        try:
            cached = await ask()
        except ServingError as error:
            self.codes[error.code] += 1
            return False
        finally:
            self.in_flight -= 1
        now = time.perf_counter()
        self.cached += cached
        self.latencies.append(now - due)
        self.answered.append(now - self.began)
        return True


async def closed_loop(ask: Ask, concurrency: int, seconds: float) -> Tally:
    """`concurrency` workers ask until `seconds` are over, and wait for what they asked last."""
    tally = Tally()

    async def worker() -> None:
        while (now := time.perf_counter()) < tally.began + seconds:
            if not await tally.count(ask, now):
                await asyncio.sleep(ERROR_PAUSE_S)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return tally


async def open_loop(ask: Ask, arrivals: npt.NDArray[np.float64]) -> Tally:
    """Ask at each of `arrivals`, (N,) ascending seconds, then wait for the answers, each as long as
    its time-out is.

    Of MAX_IN_FLIGHT requests that wait no more are sent; those are counted as `not_sent`.
    """
    tally, tasks = Tally(), []
    for due in (tally.began + arrivals).tolist():
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        if tally.in_flight >= MAX_IN_FLIGHT:
            tally.not_sent += 1
            continue
        tasks.append(asyncio.create_task(tally.count(ask, due)))
    await asyncio.gather(*tasks)
    return tally


def poisson_arrivals(
    rate: float, seconds: float, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """(N,) seconds, ascending, of a Poisson process of which it is known that N = rate x seconds
    come.

    The number is fixed so that a short step offers what it is meant to, and not what chance makes
    of it.
    """
    return np.sort(rng.uniform(0, seconds, max(round(rate * seconds), 1)))


def row_of(tally: Tally, elapsed: float, offered: float | None) -> dict[str, Any]:
    """The figures of a step that took `elapsed` seconds to its last answer; errors are in none of
    the latencies.

    `saturated`: of an open loop, whether less was achieved than SATURATED_BELOW of what was
    offered; None where ENOUGH requests were not there to tell.
    """
    achieved = len(tally.latencies) / elapsed if offered is None else kept_up(tally, offered)
    return {
        "achieved_per_s": round(achieved, 2),
        "n": len(tally.latencies),
        "errors": sum(tally.codes.values()),
        "error_codes": dict(sorted(tally.codes.items())),
        "not_sent": tally.not_sent,
        **{f"p{q}_ms": percentile_ms(tally.latencies, q) for q in (50, 90, 99)},
        "late_p99_ms": percentile_ms(tally.late, 99) if offered is not None else None,
        "cached": tally.cached,
        "seconds": round(elapsed, 2),
        "saturated": achieved < SATURATED_BELOW * offered
        if offered is not None and tally.due >= ENOUGH
        else None,
    }


def kept_up(tally: Tally, offered: float) -> float:
    """Answers a second of an open loop: over the time in which their requests came, and what it
    took longer to answer them all than to ask.

    The time that one answer takes is not in it: a server that answers each in its turn keeps up,
    however slow it is.
    """
    if not tally.latencies:
        return 0.0
    answered, latencies = np.array(tally.answered), np.array(tally.latencies)
    backlog_s = np.ptp(answered) - np.ptp(answered - latencies)
    return len(latencies) / (tally.due / offered + max(float(backlog_s), 0.0))


def percentile_ms(seconds: Sequence[float], percent: int) -> float | None:
    """In milliseconds; None of nothing."""
    return round(1000 * float(np.percentile(seconds, percent)), 2) if seconds else None
