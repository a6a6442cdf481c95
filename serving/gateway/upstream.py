"""The gateway's side of Triton: one client, what the server says of itself, and whether it
answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from regionspot.serving import canary
from regionspot.serving.client import AsyncRegionClient
from regionspot.serving.contract import RequestError, ServingError
from regionspot.serving.conversation import ServerInfo
from regionspot.serving.messages import Answer, Question

INFO_AGE_S = 5.0
"""How long the server's description is believed. It is also how soon a server that is gone is
noticed.
"""
INFO_TIMEOUT_S = 5.0
VERDICT_AGE_S = 2.0
CANARY_TIMEOUT_S = 10.0


class ModelClient(Protocol):
    """What the gateway asks of a client, such as `AsyncRegionClient`."""

    async def ask(
        self, question: Question, *, request_id: str = ..., timeout_s: float | None = ...
    ) -> Answer: ...
    async def info(self, refresh: bool = False) -> ServerInfo: ...
    async def close(self) -> None: ...


Connect = Callable[[str, float], ModelClient]


class Upstream:
    """One Triton server. It need not be up: it is first asked when a request comes."""

    def __init__(self, url: str, timeout_s: float, connect: Connect = AsyncRegionClient) -> None:
        self._client = connect(url, timeout_s)
        self._info = _Remembered(self._fetch_info)
        self._ready = _Remembered(self._try_canary)

    async def info(self) -> ServerInfo:
        """What the server runs, at most INFO_AGE_S old.

        Raises:
            ServingError: UNAVAILABLE.
        """
        return await self._info.get(INFO_AGE_S)

    async def ask(self, question: Question, request_id: str, timeout_s: float) -> Answer:
        """Raises ServingError, as `AsyncRegionClient.ask`."""
        try:
            return await self._client.ask(question, request_id=request_id, timeout_s=timeout_s)
        except RequestError:
            raise
        except Exception:
            self._info.forget()
            raise

    async def check(self) -> None:
        """Have the server answer a small question; the last answer counts for VERDICT_AGE_S.

        Raises:
            ServingError: it does not, or not rightly.
        """
        verdict = await self._ready.get(VERDICT_AGE_S)
        if verdict is not None:
            raise verdict

    async def close(self) -> None:
        await self._client.close()

    async def _fetch_info(self) -> ServerInfo:
        try:
            return await asyncio.wait_for(self._client.info(refresh=True), INFO_TIMEOUT_S)
        except TimeoutError as error:  # the client tries a server that is gone until then
            raise ServingError(
                "UNAVAILABLE", f"no description of the model within {INFO_TIMEOUT_S} s"
            ) from error

    async def _try_canary(self) -> Exception | None:
        try:
            question = canary.question_for(await self.info())
            asked = self._client.ask(question, request_id="canary", timeout_s=CANARY_TIMEOUT_S)
            canary.judge(await asyncio.wait_for(asked, CANARY_TIMEOUT_S))
        except Exception as error:
            self._info.forget()
            return error
        return None


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
