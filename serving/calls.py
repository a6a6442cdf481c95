"""One call of a server: how often and how long it is tried, and where signals may not reach it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from regionspot.errors import InputError, is_interrupt
from regionspot.serving.contract import RETRYABLE, ServingError

DEFAULT_TIMEOUT_S = 60.0
FIRST_DELAY_S, MAX_DELAY_S = 0.1, 2.0
RETRY_AFTER_SPREAD = 0.25
"""Those whom a server told the same time come back over this much more of it."""

MAX_DEATHS = 3
STUB_DIED = "is not healthy"  # Triton's words for it
ResultT = TypeVar("ResultT")


class Attempts:
    """How often and how long one call is tried: with growing, random pauses, until its time is
    over. A pause that the server asks for is kept.

    A call that met the death of a model's process MAX_DEATHS times may be what kills it, and is not
    sent again.

    Raises:
        InputError: a time-out that is none.
    """

    def __init__(self, timeout_s: float, retry: bool = True) -> None:
        if not timeout_s > 0:
            raise InputError(f"a time-out must be more than 0 seconds, not {timeout_s}")
        self.timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._delays, self._retry, self._deaths = _delays(), retry, 0

    @property
    def left_s(self) -> float:
        """Until the deadline; never quite nothing."""
        return max(self._deadline - time.monotonic(), 0.001)

    def delay_after(self, error: ServingError) -> float:
        """Seconds to wait before the next attempt. Raises `error` if there is none: at once, where
        the server asks for more than the time that is left.
        """
        delay_s = next(self._delays)
        if error.retry_after_s is not None:
            delay_s = max(delay_s, error.retry_after_s)
        self._deaths += STUB_DIED in str(error)
        if (
            not self._retry
            or error.code not in RETRYABLE
            or self.left_s <= delay_s
            or self._deaths > MAX_DEATHS
        ):
            raise error
        if error.retry_after_s is not None:
            spread_s = delay_s * random.uniform(1.0, 1.0 + RETRY_AFTER_SPREAD)
            delay_s = min(spread_s, (delay_s + self.left_s) / 2)
        return delay_s


def call(
    attempts: Attempts,
    ask: Callable[[float], ResultT],
    translated: Callable[[Exception], ServingError],
) -> ResultT:
    """`ask(seconds left)` until it succeeds or is not to be tried again.

    Raises:
        ServingError: what `translated` makes of the last error.
    """
    while True:
        try:
            return ask(attempts.left_s)
        except Exception as error:
            if is_interrupt(error):
                raise
            time.sleep(attempts.delay_after(translated(error)))


async def call_async(
    attempts: Attempts,
    ask: Callable[[float], Awaitable[ResultT]],
    translated: Callable[[Exception], ServingError],
) -> ResultT:
    """As `call`, for asyncio; an attempt that takes longer than the time left is cancelled."""
    while True:
        try:
            return await asyncio.wait_for(ask(attempts.left_s), attempts.left_s)
        except Exception as error:
            if is_interrupt(error):
                raise
            failure = await asyncio.to_thread(translated, error)  # it may ask the port
            await asyncio.sleep(attempts.delay_after(failure))


def without_signals(work: Callable[[], ResultT]) -> ResultT:
    """`work()`, in a thread in which no signal handler runs.

    gRPC reports what a handler raises while it serializes or deserializes a message as an error of
    its own, and HTTP clients take a handler's TimeoutError for a socket's. An interrupted call goes
    on in its thread until its time-out; its answer is dropped.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    return started(work).result()


def started(work: Callable[[], ResultT]) -> Future[ResultT]:
    """The result of `work()`, which begins in a thread that no process waits for at its end."""
    answer: Future[ResultT] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def _delays() -> Iterator[float]:
    delay_s = FIRST_DELAY_S
    while True:
        yield delay_s * random.uniform(0.5, 1.0)
        delay_s = min(2 * delay_s, MAX_DELAY_S)
