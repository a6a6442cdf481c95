"""Load on a running server: how many requests a second it answers, how soon, and what becomes of it
past that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.benchmarks import perf_analyzer
from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.loops import (
    MAX_IN_FLIGHT,
    Ask,
    Tally,
    closed_loop,
    open_loop,
    poisson_arrivals,
    row_of,
)
from regionspot.benchmarks.questions import Picture, mean_regions, never_seen, pictures_of
from regionspot.benchmarks.server_statistics import Statistics, work_between
from regionspot.errors import InputError
from regionspot.serving.address import Address
from regionspot.serving.client import AsyncRegionClient, RegionClient, make_question
from regionspot.serving.contract import MODEL, ServingError
from regionspot.serving.conversation import ServerInfo
from regionspot.serving.messages import RemoteImage
from regionspot.serving.triton import Connection
from regionspot.structures import FloatArray

logger = logging.getLogger(__name__)

FRACTIONS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25)
"""Of the closed loop's best: what the open loop offers unless told otherwise."""

FIRST_ANSWER_S = 10.0
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
COMPARED = ("n", "achieved_per_s", "p50_ms", "p90_ms", "p99_ms")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        url: of the server's gRPC port.
        vocabulary: a registered one; None takes the server's first.
        regions: boxes of each request, one sweep for each number; None are the picture's own.
        modes: of "closed" and "open".
        concurrency: workers of each step of the closed loop.
        rates: requests a second of each step of the open loop; None are FRACTIONS of the closed
            loop's best.
        seconds: of each step.
        warm_up: requests before each step, at least.
        known: ask by handle about pictures that the server has encoded; otherwise every picture is
            new to it.
        timeout_s: of each request.
        perf_analyzer: that program, to ask the same once more at the lowest concurrency.

    Raises:
        InputError: a number that cannot be, or options that do not go together.
    """

    url: str
    vocabulary: str | None = None
    regions: tuple[int | None, ...] = (None,)
    modes: tuple[str, ...] = ("closed", "open")
    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    rates: tuple[float, ...] | None = None
    seconds: float = 5.0
    warm_up: int = 5
    seed: int = 0
    known: bool = False
    masks: bool = False
    timeout_s: float = 60.0
    perf_analyzer: str | None = None

    def __post_init__(self) -> None:
        if Address.parse(self.url).protocol != "grpc":
            raise InputError(
                "load is sent by gRPC: give --url HOST:PORT of the server's gRPC port, not "
                f"{self.url}"
            )
        numbers = {
            "--seconds": self.seconds,
            "--timeout": self.timeout_s,
            "--rates": min(self.rates or (1,)),
        }
        numbers |= {
            "--concurrency": min(self.concurrency),
            "--regions": min(1 if one is None else one for one in self.regions),
        }
        for option, value in numbers.items():
            if not 0 < value < float("inf"):
                raise InputError(f"{option} must be more than 0, not {value}")
        if self.warm_up < 0 or self.seed < 0:
            raise InputError("--warm-up and --seed must be 0 or more")
        if "closed" not in self.modes and (self.rates is None or self.perf_analyzer):
            raise InputError(
                "--rates auto and --perf-analyzer go by the closed loop's figures: use --mode "
                "both, or give --rates"
            )


def measure(plan: Plan, data: str | Path | None) -> dict[str, Any]:
    """The report; `data` as in `pictures_of`. Each row is logged.

    Raises:
        InputError: pictures, a vocabulary or a number of regions that cannot be used.
        ServingError: the server cannot be reached, or refuses what it is asked.
    """
    if plan.perf_analyzer:
        perf_analyzer.check_binary(plan.perf_analyzer)
    with RegionClient(plan.url, FIRST_ANSWER_S, retry=False) as client:
        info = client.info()
    vocabulary = _vocabulary(plan, info)
    pictures = pictures_of(data, plan.seed)
    most = max(len(picture.regions(count)) for count in plan.regions for picture in pictures)
    if most > info.limits.max_regions:
        raise InputError(
            f"--regions: {plan.url} takes {info.limits.max_regions} of a picture, not {most}"
        )
    load = _Load(plan, pictures, vocabulary)
    asyncio.run(load.sweep())
    rows = load.rows
    report = {
        "benchmark": "load",
        "conditions": _conditions(plan, info, vocabulary, pictures, data),
        "rows": rows,
        "saturation_per_s": max(row["achieved_per_s"] for row in rows),
        "saturation": [
            {
                "regions": regions,
                "per_s": max(row["achieved_per_s"] for row in rows if row["regions"] == regions),
            }
            for regions in dict.fromkeys(row["regions"] for row in rows)
        ],
    }
    return report | ({"perf_analyzer": {"rows": load.checks}} if plan.perf_analyzer else {})


class _Load:
    """Takes a plan's steps, one after another; `rows` and `checks` are their figures and those of
    `perf_analyzer`.
    """

    def __init__(self, plan: Plan, pictures: Sequence[Picture], vocabulary: str) -> None:
        self.plan, self.pictures, self.vocabulary = plan, pictures, vocabulary
        self.rng = np.random.default_rng(plan.seed)
        self.connection = Connection(plan.url, FIRST_ANSWER_S)
        self.rows: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.known: list[RemoteImage] = []
        self.boxes: list[FloatArray] = []
        self.regions = 0.0

    async def sweep(self) -> None:
        with self.connection:
            async with AsyncRegionClient(self.plan.url, self.plan.timeout_s, retry=False) as client:
                for count in self.plan.regions:
                    self.regions = mean_regions(self.pictures, count)
                    self.boxes = [picture.regions(count) for picture in self.pictures]
                    if self.plan.known:
                        self.known = [
                            await client.encode(picture.encoded) for picture in self.pictures
                        ]
                    await self._steps(await self._asking(client))

    async def _asking(self, client: AsyncRegionClient) -> Ask:
        """Asks about one picture after another. The first answer is not counted, and a refusal
        raises.
        """
        numbers = itertools.count()

        async def ask() -> bool:
            index = next(numbers) % len(self.pictures)
            image = self.known[index] if self.known else never_seen(self.pictures[index].encoded)
            question = make_question(
                image, self.boxes[index], self.vocabulary, return_masks=self.plan.masks
            )
            return (await client.ask(question)).cached

        await ask()
        return ask

    async def _steps(self, ask: Ask) -> None:
        plan, best = self.plan, 0.0
        for concurrency in plan.concurrency if "closed" in plan.modes else ():
            head = {"mode": "closed", "concurrency": concurrency, "offered_per_s": None}
            row = await self._step(head, ask, partial(closed_loop, ask, concurrency, plan.seconds))
            best = max(best, row["achieved_per_s"])
            if plan.perf_analyzer and concurrency == min(plan.concurrency):
                self.checks.append(self._cross_check(plan.perf_analyzer, row))
        rates = (
            plan.rates
            if plan.rates is not None
            else tuple(fraction * best for fraction in FRACTIONS if best)
        )
        for rate in rates if "open" in plan.modes else ():
            arrivals = poisson_arrivals(rate, plan.seconds, self.rng)
            head = {
                "mode": "open",
                "concurrency": None,
                "offered_per_s": round(len(arrivals) / plan.seconds, 2),
            }
            await self._step(head, ask, partial(open_loop, ask, arrivals))

    async def _step(
        self, head: dict[str, Any], ask: Ask, run: Callable[[], Awaitable[Tally]]
    ) -> dict[str, Any]:
        at_once = head["concurrency"] or 1
        for _ in range(-(-self.plan.warm_up // at_once)):
            aside = Tally()
            await asyncio.gather(*(aside.count(ask, aside.began) for _ in range(at_once)))
        before, cpu = self._statistics(), time.process_time()
        tally = await run()
        elapsed, cpu = time.perf_counter() - tally.began, time.process_time() - cpu
        row = head | row_of(tally, elapsed, head["offered_per_s"])
        row |= {"regions": self.regions, "client_cores": round(cpu / elapsed, 3)}
        row["server"] = work_between(before, self._statistics())
        self.rows.append(row)
        logger.info(line_of(row))
        return row

    def _cross_check(self, binary: str, ours: Mapping[str, Any]) -> dict[str, Any]:
        """What `perf_analyzer` makes of the same questions, right after ours: other minutes may be
        other loads.
        """
        requests = min(
            max(ours["n"], ours["concurrency"], perf_analyzer.MIN_REQUESTS),
            perf_analyzer.MAX_REQUESTS,
        )
        images = (
            self.known[index % len(self.known)].handle
            if self.known
            else never_seen(self.pictures[index % len(self.pictures)].encoded)
            for index in range(requests + perf_analyzer.SPARE)
        )
        data = perf_analyzer.input_data(images, self.boxes, self.vocabulary, self.plan.masks)
        found = perf_analyzer.run(binary, self.plan.url, data, requests, ours["concurrency"])
        work = ours["server"].get(MODEL, {})
        compared = {f"ours_{name}": ours[name] for name in COMPARED}
        compared |= {
            f"ours_server_{name}": work.get(name) for name in ("queue_ms", "compute_infer_ms")
        }
        logger.info(
            "perf_analyzer: "
            + (found.get("error") or "p50 {p50_ms} ms, p99 {p99_ms} ms of {n}".format(**found))
        )
        return {"regions": self.regions, **found, **compared}

    def _statistics(self) -> Statistics:
        """Nothing, of a server that does not answer: the requests' errors say so."""
        try:
            found: Statistics = self.connection.all_statistics()
        except ServingError:
            return {}
        return found


def line_of(row: Mapping[str, Any]) -> str:
    """A row in a line, for who waits for the next."""
    closed = row["mode"] == "closed"
    asked = f"{row['concurrency']} at once" if closed else f"{row['offered_per_s']:.1f}/s offered"
    parts = [
        f"{row['mode']} loop, {row['regions']:g} regions, {asked}: {row['achieved_per_s']:.1f}/s"
    ]
    if row["n"]:
        parts.append(f"p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms of {row['n']}")
    if row["errors"]:
        parts.append(
            "errors: " + ", ".join(f"{count} {code}" for code, count in row["error_codes"].items())
        )
    parts += [f"{row['not_sent']} not sent"] * bool(row["not_sent"]) + ["saturated"] * bool(
        row["saturated"]
    )
    return "; ".join(parts)


def _vocabulary(plan: Plan, info: ServerInfo) -> str:
    registered = list(info.vocabularies)
    if not registered:
        raise InputError(
            f"{plan.url} has registered no vocabulary: regionspot-serve init --vocabulary "
            "NAME=WORDS"
        )
    name = registered[0] if plan.vocabulary is None else plan.vocabulary
    if name not in registered:
        raise InputError(f"{plan.url} has registered {', '.join(registered)}, not {name}")
    return name


def _conditions(
    plan: Plan,
    info: ServerInfo,
    vocabulary: str,
    pictures: Sequence[Picture],
    data: str | Path | None,
) -> dict[str, Any]:
    picture = "decoding, both encoders" if not plan.known else "a picture's handle in its place"
    local = Address.parse(plan.url).host.rpartition(":")[0] in LOOPBACK
    place = (
        "on the server's machine, whose processor it shares"
        if local
        else "by the server's network address"
    )
    return conditions(
        model=info.model,
        runtime=info.runtime,
        precision=info.precision,
        vocabulary=vocabulary,
        words=len(info.vocabularies[vocabulary]),
        pictures=f"{len(pictures)} of {'the mini world' if data is None else Path(data).name}",
        picture="known" if plan.known else "new",
        masks=plan.masks,
        seconds=plan.seconds,
        warm_up=plan.warm_up,
        seed=plan.seed,
        timeout_s=plan.timeout_s,
        max_in_flight=MAX_IN_FLIGHT,
        includes=f"gRPC, {picture}, token decoder, head and top-k; "
        f"{'with' if plan.masks else 'no'} masks",
        client=f"one process, asyncio over gRPC, {place}; the processor above is the client's",
    )
