"""Send requests to a running server over gRPC, and say how many a second it answers, how soon, and
what happens past that. A closed loop of several workers finds the most that it can do; an open loop
then offers a part of that, all of it, and more, in a Poisson process, with each latency counted
from when its request was due.
"""

from __future__ import annotations

import argparse
from typing import Any

from regionspot.errors import InputError

SUMMARY = "requests a second and latency of a running server, to saturation and past it"
OWN, AUTO, MODES = "own", "auto", ("closed", "open", "both")


def add_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url",
        default="127.0.0.1:8001",
        metavar="HOST:PORT",
        help="its gRPC port (default: %(default)s)",
    )
    server.add_argument(
        "--vocabulary", metavar="NAME", help="a registered one (default: the server's first)"
    )
    server.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of each request (%(default)s); past it, an error",
    )
    asked = parser.add_argument_group("requests")
    asked.add_argument(
        "--data",
        metavar="JSON",
        help="pictures and boxes: annotations in COCO format (default: of the mini world)",
    )
    asked.add_argument(
        "--regions",
        default=OWN,
        metavar="LIST",
        help="boxes of each request, such as 1,10, each measured by itself: a picture's first "
        "ones, repeated with small shifts where it has fewer (default: each picture's own)",
    )
    asked.add_argument(
        "--picture",
        choices=("new", "known"),
        default="new",
        help="new: no two requests have the same bytes, so that nothing is cached; known: by the "
        "handle of a picture that the server has encoded (default: %(default)s)",
    )
    asked.add_argument("--masks", action="store_true", help="ask for masks too")
    _add_load_options(parser.add_argument_group("load"))


def _add_load_options(load: Any) -> None:
    load.add_argument(
        "--mode", choices=MODES, default="both", help="loops to measure (default: %(default)s)"
    )
    load.add_argument(
        "--concurrency",
        default="1,2,4,8",
        metavar="LIST",
        help="workers of the closed loop (default: %(default)s)",
    )
    load.add_argument(
        "--rates",
        default=AUTO,
        metavar="LIST",
        help="requests a second of the open loop (default: auto, 0.25, 0.5, 0.75, 0.9, 1 and 1.25 "
        "of the closed loop's best)",
    )
    load.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        metavar="N",
        help="of each step (%(default)s); below a hundred requests chance rules",
    )
    load.add_argument(
        "--warm-up",
        type=int,
        default=5,
        metavar="N",
        help="requests before each step, not counted (%(default)s)",
    )
    load.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of arrivals and mini pictures (%(default)s)",
    )
    load.add_argument(
        "--perf-analyzer",
        metavar="PATH",
        help="Triton's own load generator, of tritonclient 2.50's wheel: asks the same at the "
        "lowest concurrency",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises RegionSpotError for options, pictures or a server that cannot be used."""
    regions = None if arguments.regions == OWN else _numbers("--regions", arguments.regions, int)
    concurrency = _numbers("--concurrency", arguments.concurrency, int)
    rates = None if arguments.rates == AUTO else _numbers("--rates", arguments.rates, float)

    from regionspot.benchmarks.load import Plan, measure

    plan = Plan(
        url=arguments.url,
        vocabulary=arguments.vocabulary,
        regions=(None,) if regions is None else regions,
        modes=("closed", "open") if arguments.mode == "both" else (arguments.mode,),
        concurrency=concurrency,
        rates=rates,
        seconds=arguments.seconds,
        warm_up=arguments.warm_up,
        seed=arguments.seed,
        known=arguments.picture == "known",
        masks=arguments.masks,
        timeout_s=arguments.timeout,
        perf_analyzer=arguments.perf_analyzer,
    )
    return measure(plan, arguments.data)


def _numbers(option: str, text: str, kind: type) -> tuple[Any, ...]:
    """Of a list with commas; repeated ones once."""
    try:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError as error:
        raise InputError(
            f"{option} takes numbers with commas in between, such as 1,10, not {text!r}"
        ) from error
