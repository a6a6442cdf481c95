"""A soak test of serving: callers of every kind ask a gateway and a server for minutes on end while
processes are killed, disks and shared memory are full, and three times as much is asked as can be
answered. No answer may be wrong, no call may hang, and all must come back by itself.

    python -m regionspot.benchmarks.soak --artifacts artifacts --minutes 30

Gateway and server are started again when they end, as a service manager does. Linux only; needs
unshare(1) from util-linux.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.loops import (
    closed_loop,
    open_loop,
    percentile_ms,
    poisson_arrivals,
    row_of,
)
from regionspot.benchmarks.questions import never_seen, pictures_of
from regionspot.benchmarks.soak_callers import (
    RETRIABLE,
    VOCABULARY,
    Callers,
    Case,
    make_cases,
    seconds_until_right,
)
from regionspot.benchmarks.soak_service import TARGETS, Service
from regionspot.files import write_atomically
from regionspot.predictor import RegionPredictor
from regionspot.progress import Progress
from regionspot.runtime.opening import open_pipeline
from regionspot.serving.client import AsyncRegionClient
from regionspot.serving.contract import Limits, ServingError
from regionspot.serving.environment import default_home
from regionspot.serving.repository import RepositoryOptions, make_repository
from regionspot.tables import text_table
from regionspot.vocabulary import parse_vocabulary

RESULT = Path(__file__).parent / "results" / "soak.json"
KILLS = 50
ROUNDS = 3
"""Of overload and of full shared memory."""

STEADY, OVERLOAD = 0.7, 3.0
"""Load, as a part of what can be answered."""

STEADY_SHARE = 0.25
"""Of the time, before anything is broken."""

MAX_GROWTH = 0.02
"""Of the memory in the second half of the steady load."""

CAPACITY_S, OVERLOAD_S, FULL_S, QUIET_S = 15.0, 20.0, 20.0, 3.0
CAPACITY_CALLERS = 8
START_S, BACK_S = 300.0, 120.0
"""How long a first answer, and one after a fault, may take."""

LIMITS = Limits(image_cache_mb=16)
"""Small, so that images come and go."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regionspot.benchmarks.soak",
        description="Ask a gateway and a server for minutes on end while things are broken.",
    )
    parser.add_argument("--artifacts", required=True, metavar="DIR", help="from regionspot-export")
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument(
        "--kills", type=int, default=KILLS, metavar="N", help="of processes (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        metavar="N",
        help="of overload and of full shared memory (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--home", type=Path, metavar="DIR", help="where the Triton server is kept")
    parser.add_argument(
        "--out", type=Path, default=RESULT, metavar="FILE", help="default: %(default)s"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is then stopped
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_repository(
            arguments.artifacts,
            folder / "repository",
            RepositoryOptions(vocabularies={VOCABULARY: VOCABULARY}, limits=LIMITS),
        )
        with open_pipeline(arguments.artifacts) as pipeline:
            pictures = pictures_of(None, arguments.seed)
            names = parse_vocabulary(VOCABULARY)
            cases = make_cases(RegionPredictor(pipeline), pictures, names, rng)
        home = arguments.home or default_home()
        service = Service(folder / "repository", home, folder)
        plan = Plan(arguments.minutes * 60, arguments.kills, arguments.rounds)
        try:
            found = soak(service, cases, plan, arguments.seed)
        finally:
            left = service.stop()
    found["processes_left"] = left
    command = (
        f"python -m regionspot.benchmarks.soak --artifacts DIR --minutes {arguments.minutes:g}"
    )
    found = {"command": command, "conditions": conditions(), **found}
    write_atomically(arguments.out, (json.dumps(found, indent=1) + "\n").encode())
    print(summary(found))
    return 1 if found["faults"] or left else 0


@dataclass(frozen=True)
class Plan:
    """What is broken when.

    Args:
        seconds: of all.
        kills: spread over that time.
        rounds: of overload and of full shared memory, between them.
    """

    seconds: float
    kills: int = KILLS
    rounds: int = ROUNDS

    @property
    def steady_s(self) -> float:
        """Seconds of steady load, before all events."""
        return STEADY_SHARE * self.seconds if self.rounds else 0.0

    def events(self, rng: random.Random) -> list[tuple[float, str]]:
        """(seconds since the steady load, one of TARGETS or "overload" or "full shared memory"),
        in order: each at a random time of its slot.
        """
        kinds = list(itertools.islice(itertools.cycle(TARGETS), self.kills))
        for number in range(self.rounds):
            place = (2 * number + 1) * len(kinds) // (2 * self.rounds)
            kinds[place:place] = ["overload", "full shared memory"]
        slot_s = (self.seconds - self.steady_s) / len(kinds)
        return [((index + rng.random()) * slot_s, kind) for index, kind in enumerate(kinds)]


@dataclass
class Report:
    """What was broken, and how long it took until there was a right answer again."""

    back_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    overload: list[dict[str, Any]] = field(default_factory=list)


def soak(service: Service, cases: dict[str, list[Case]], plan: Plan, seed: int) -> dict[str, Any]:
    """Runs a plan; what came of it. `service` is started, and left running."""
    rng, report, probe = random.Random(seed), Report(), cases["words"][0]
    service.start()
    started_s = seconds_until_right(probe, service.web_url, START_S)
    if started_s is None:
        raise ServingError("UNAVAILABLE", f"there was no right answer within {START_S:.0f} s")
    callers = Callers(cases, service.web_url, service.grpc_url, seed)
    load, steady = Load(cases, service.web_url, seed), None
    if plan.rounds:
        load.measure()
        steady = _steady(load, service, plan.steady_s)
        if steady["growth"] > MAX_GROWTH:
            callers.fault(f"memory grew by {steady['growth']:.1%} under steady load")
    events = plan.events(rng)
    began = time.monotonic()
    with callers, Progress("soak", len(events), "faults") as progress:
        for done, (due, kind) in enumerate(events, 1):
            time.sleep(max(began + due - time.monotonic(), 0))
            try:
                _break(kind, service, load, report, rng)
            except OSError as error:
                callers.fault(f"{kind} could not be tried: {error}")
                continue
            back_s = seconds_until_right(probe, service.web_url, BACK_S)
            if back_s is None:
                callers.fault(f"no right answer within {BACK_S:.0f} s after {kind}")
            else:
                report.back_s[kind].append(round(back_s, 2))
            progress.update(done)
        time.sleep(max(began + plan.seconds - plan.steady_s - time.monotonic(), 0))
    for case in itertools.chain(*cases.values()):
        if seconds_until_right(case, service.web_url, BACK_S) is None:
            callers.fault("a question is not answered rightly at the end")
            break
    rows = report.overload if steady is None else [steady, *report.overload]
    for code in {code for row in rows for code in row["error_codes"]} - set(RETRIABLE):
        callers.fault(f"{code} under steady load or overload")
    return {
        "seconds": round(time.monotonic() - began + plan.steady_s, 1),
        "capacity_per_s": round(load.capacity_per_s, 2),
        "steady": steady,
        "calls": {kind: dict(sorted(codes.items())) for kind, codes in callers.codes.items()},
        "latency_ms": {kind: _milliseconds(times) for kind, times in callers.seconds.items()},
        "back_s": {
            kind: {"n": len(times), "median": float(np.median(times)), "max": max(times)}
            for kind, times in report.back_s.items()
        },
        "overload": report.overload,
        "starts": service.starts,
        "starts_on_full_disk": service.on_full_disk,
        "peak_mib": round(service.peak_bytes / 2**20, 1),
        "faults": callers.faults,
    }


def _break(kind: str, service: Service, load: Load, report: Report, rng: random.Random) -> None:
    """Raises OSError where there is nothing to break."""
    if kind == "overload":
        report.overload.append(load.offer(OVERLOAD, OVERLOAD_S))
    elif kind == "full shared memory":
        with service.full_shared_memory():
            time.sleep(FULL_S)
    else:
        service.kill(kind, rng)


class Load:
    """Questions about new images at a rate, each with a right answer or an error of the gateway."""

    def __init__(self, cases: dict[str, list[Case]], url: str, seed: int) -> None:
        self._cases = itertools.cycle([*cases["words"], *cases["vocabulary"]])
        self._url, self._rng = url, np.random.default_rng(seed)
        self.capacity_per_s = 0.0

    def measure(self) -> None:
        """Finds the capacity: answers a second, from callers who each wait for theirs."""
        asyncio.run(self._measure())

    def offer(self, load: float, seconds: float) -> dict[str, Any]:
        """Offers a multiple of the capacity, from callers who do not come back; see `row_of`."""
        return asyncio.run(self._offer(load * self.capacity_per_s, seconds))

    async def _measure(self) -> None:
        async with AsyncRegionClient(self._url) as client:
            began = time.perf_counter()
            tally = await closed_loop(partial(self._ask, client), CAPACITY_CALLERS, CAPACITY_S)
            self.capacity_per_s = len(tally.latencies) / (time.perf_counter() - began)

    async def _offer(self, per_s: float, seconds: float) -> dict[str, Any]:
        arrivals = poisson_arrivals(per_s, seconds, self._rng)
        async with AsyncRegionClient(self._url, retry=False) as client:
            began = time.perf_counter()
            tally = await open_loop(partial(self._ask, client), arrivals)
            row = row_of(tally, time.perf_counter() - began, per_s)
        return {"offered_per_s": round(per_s, 2), **row}

    async def _ask(self, client: AsyncRegionClient) -> bool:
        case = next(self._cases)
        found = await client.recognize(never_seen(case.image), **case.given)
        if not case.is_right(found):
            raise ServingError("INTERNAL", "a wrong answer")
        return False


def _steady(load: Load, service: Service, seconds: float) -> dict[str, Any]:
    """Steady load, and how much the memory of all processes grew in its second half."""
    load.offer(STEADY, seconds / 2)
    time.sleep(QUIET_S)
    before = service.memory_bytes()
    row = load.offer(STEADY, seconds / 2)
    time.sleep(QUIET_S)
    after = service.memory_bytes()
    mib = {"mib_before": before / 2**20, "mib_after": after / 2**20}
    return {**row, **mib, "growth": round(after / before - 1, 4)}


def summary(found: dict[str, Any]) -> str:
    """A result as tables for people."""
    calls = [
        [kind, *(str(codes.get(code, "")) for code in _codes(found)), *_shown(found, kind)]
        for kind, codes in sorted(found["calls"].items())
    ]
    back = [
        [kind, str(times["n"]), f"{times['median']:.1f}", f"{times['max']:.1f}"]
        for kind, times in sorted(found["back_s"].items())
    ]
    parts = [
        text_table(["callers", *_codes(found), "p50 ms", "p99 ms"], calls),
        text_table(["broken", "times", "median s until right", "at most"], back),
        "\n".join(found["faults"]) or "no wrong answer, no call that hung",
    ]
    return "\n\n".join(parts)


def _codes(found: dict[str, Any]) -> list[str]:
    return sorted({code for codes in found["calls"].values() for code in codes})


def _shown(found: dict[str, Any], kind: str) -> list[str]:
    times = found["latency_ms"].get(kind)
    return ["", ""] if times is None else [f"{times['p50']:.0f}", f"{times['p99']:.0f}"]


def _milliseconds(seconds: Sequence[float]) -> dict[str, float | None]:
    return {
        name: percentile_ms(seconds, percent)
        for name, percent in (("p50", 50), ("p99", 99), ("max", 100))
    }


if __name__ == "__main__":
    sys.exit(main())
