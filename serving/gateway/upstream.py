"""The gateway's side of Triton: one client, what the server says of itself, and whether it
answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal, Protocol

from regionspot.serving import canary
from regionspot.serving.calls import Attempts
from regionspot.serving.client import AsyncRegionClient
from regionspot.serving.contract import RequestError, ServingError
from regionspot.serving.conversation import ServerInfo
from regionspot.serving.gateway.settings import TlsFiles
from regionspot.serving.messages import Answer, Question

INFO_AGE_S = 5.0
"""How long the server's description is believed. It is also how soon a server that is gone is
noticed.
"""
INFO_TIMEOUT_S = 3.0
VERDICT_AGE_S = 2.0
CANARY_TIMEOUT_S = 10.0
PROGRESS_S = 30.0
"""A server that gave an answer so long ago is up, whatever else failed: it is busy."""

State = Literal["unknown", "up", "down"]


class ModelClient(Protocol):
    """What the gateway asks of a client, such as `AsyncRegionClient`."""

    async def ask(
        self, question: Question, *, request_id: str = ..., timeout_s: float | None = ...
    ) -> Answer: ...
    async def info(self, refresh: bool = False) -> ServerInfo: ...
    async def close(self) -> None: ...


Connect = Callable[[str, float], ModelClient]


def connector(tls: TlsFiles) -> Connect:
    """Makes clients that ask once: the gateway says itself how often and how long to try."""
    names = {"ca_file": tls.ca, "client_cert_file": tls.cert, "client_key_file": tls.key}
    given: dict[str, Any] = {name: path for name, path in names.items() if path is not None}
    return partial(AsyncRegionClient, retry=False, **given)


class Upstream:
    """One Triton server. It need not be up: it is first asked when a request comes."""

    def __init__(self, url: str, timeout_s: float, connect: Connect) -> None:
        self._client = connect(url, timeout_s)
        self._info = _Remembered(self._fetch_info)
        self._verdict = _Remembered(self._try_canary)
        self.health = Health()

    async def info(self) -> ServerInfo:
        """What the server runs, at most INFO_AGE_S old.

        Raises:
            ServingError: UNAVAILABLE; at once, where the server is known to be gone.
        """
        return await self._info.get(INFO_AGE_S)

    async def ask(self, question: Question, request_id: str, timeout_s: float | None) -> Answer:
        """As `AsyncRegionClient.ask`, once.

        Raises:
            ServingError: as `AsyncRegionClient.ask`.
        """
        try:
            answer = await self._client.ask(question, request_id=request_id, timeout_s=timeout_s)
        except RequestError:
            self.health.answered()
            raise
        except Exception as error:
            self._info.forget()
            self.health.failed(error)
            raise
        self.health.answered()
        return answer

    async def check(self) -> None:
        """Returns if the server answered a question a moment ago, or answers a small one now; that
        verdict counts for VERDICT_AGE_S.

        Raises:
            ServingError: it does not, or not rightly, and has not for PROGRESS_S.
        """
        if self.health.answers(VERDICT_AGE_S):
            return
        verdict = await self._verdict.get(VERDICT_AGE_S)
        # a server with a long queue answers others, and the small question later
        if verdict is not None and not self.health.answers(PROGRESS_S):
            raise verdict

    async def look(self, idle_s: float) -> None:
        """Looks at the server, if nobody was answered by it for `idle_s`. Raises nothing."""
        if not self.health.answers(idle_s):
            with suppress(Exception):
                await (self.check() if self.health.state == "down" else self.info())

    async def close(self) -> None:
        await self._client.close()

    async def _fetch_info(self) -> ServerInfo:
        attempts = Attempts(0.001 if self.health.state == "down" else INFO_TIMEOUT_S)
        try:
            async with asyncio.timeout(INFO_TIMEOUT_S):
                info = await self._describe(attempts)
        except TimeoutError as error:
            failure = ServingError(
                "UNAVAILABLE", f"no description of the model within {INFO_TIMEOUT_S} s"
            )
            self.health.failed(failure)
            raise failure from error
        except Exception as error:
            self.health.failed(error)
            raise
        self.health.described()
        return info

    async def _describe(self, attempts: Attempts) -> ServerInfo:
        while True:
            try:
                return await self._client.info(refresh=True)
            except ServingError as error:
                await asyncio.sleep(attempts.delay_after(error))

    async def _try_canary(self) -> Exception | None:
        try:
            question = canary.question_for(await self.info())
            asked = self._client.ask(question, request_id="canary", timeout_s=CANARY_TIMEOUT_S)
            canary.judge(await asyncio.wait_for(asked, CANARY_TIMEOUT_S))
        except Exception as error:
            self._info.forget()
            self.health.failed(error)
            return error
        self.health.answered()
        return None


class Health:
    """What the last requests say about a server."""

    def __init__(self) -> None:
        self.state: State = "unknown"
        self._answered_at = -float("inf")
        self._described_is_enough = True

    def answered(self) -> None:
        """It answered a question, or refused it."""
        self._answered_at = time.monotonic()
        self.state, self._described_is_enough = "up", True

    def described(self) -> None:
        """It said what it runs; that is no sign that it answers, once it did not."""
        if self._described_is_enough:
            self.state = "up"

    def failed(self, error: Exception) -> None:
        """A question or the description failed: one that is merely late does not count while others
        are answered.
        """
        code = error.code if isinstance(error, ServingError) else "INTERNAL"
        gone = code == "UNAVAILABLE"
        if gone or (code != "OVERLOADED" and not self.answers(PROGRESS_S)):
            self.state = "down"
            self._described_is_enough = gone

    def answers(self, within_s: float) -> bool:
        """Whether it answered a question within the last seconds, and is not known to be gone
        since.
        """
        return self.state == "up" and time.monotonic() - self._answered_at < within_s


class _Remembered:
    """A value that is fetched once for all who want it, and kept for a while. Failures are not
    kept.
    """

    def __init__(self, fetch: Callable[[], Any]) -> None:
        self._fetch, self._value = fetch, None
        self._fetched_at: float | None = None
        self._fetching: asyncio.Task[Any] | None = None

    def forget(self) -> None:
        self._fetched_at = None

    async def get(self, max_age_s: float) -> Any:
        if self._fetched_at is not None and time.monotonic() - self._fetched_at < max_age_s:
            return self._value
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._fetch_and_keep())
            self._fetching.add_done_callback(_look_at)
        return await asyncio.shield(self._fetching)

    async def _fetch_and_keep(self) -> Any:
        value = await self._fetch()
        self._value, self._fetched_at = value, time.monotonic()
        return value


def _look_at(task: asyncio.Task[Any]) -> None:
    """So that a failure that nobody waited for any more is not reported as forgotten."""
    if not task.cancelled():
        task.exception()
