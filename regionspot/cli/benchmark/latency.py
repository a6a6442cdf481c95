"""Time and memory of each graph and of the whole path, for each runtime and precision, batch and
number of regions, beside what this machine's measured rates of a matrix product and of a copy would
allow.
"""

from __future__ import annotations

import argparse
from typing import Any

from regionspot.cli.benchmark.options import add_target_options, chosen_targets, model_arguments
from regionspot.errors import InputError

SUMMARY = "time and memory of each graph and of the whole path"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_target_options(parser)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument(
        "--regions",
        default="1,10,100",
        metavar="LIST",
        help="of each picture (default: %(default)s)",
    )
    sizes.add_argument(
        "--batch", default="1", metavar="LIST", help="pictures at a time (default: %(default)s)"
    )
    sizes.add_argument(
        "--words",
        type=int,
        default=80,
        metavar="N",
        help="of the vocabulary (default: %(default)s)",
    )
    sizes.add_argument(
        "--picture",
        default="1920x1080",
        metavar="WxH|FILE",
        help="a generated one of that size, or a file (default: %(default)s)",
    )
    sizes.add_argument(
        "--graphs", default="all", metavar="LIST", help="only these graphs; 'whole path' is one"
    )
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="of each measurement, about"
    )
    timing.add_argument(
        "--repetitions", type=int, default=3, metavar="N", help="at least (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is generated")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report.

    Raises:
        InputError, ArtifactError: a target, graph, size or picture that there is not.
    """
    from regionspot.benchmarks.counts import counts
    from regionspot.benchmarks.latency import MEASURED, Setup, measure
    from regionspot.benchmarks.latency_worker import Request

    graphs = (
        list(MEASURED)
        if arguments.graphs == "all"
        else [name.strip() for name in arguments.graphs.split(",")]
    )
    if unknown := [name for name in graphs if name not in MEASURED]:
        raise InputError(
            f"--graphs: there is no {', '.join(unknown)}; choose of {', '.join(MEASURED)}"
        )
    if arguments.seconds < 0 or min(arguments.repetitions, arguments.words) < 1:
        raise InputError(
            "--seconds must not be negative, --repetitions and --words must be 1 or more"
        )
    chosen = chosen_targets(arguments)
    request = Request(
        runtime="",
        precision="",
        graphs=graphs,
        batches=counts("--batch", arguments.batch),
        regions=counts("--regions", arguments.regions),
        words=arguments.words,
        picture="",
        seconds=arguments.seconds,
        at_least=arguments.repetitions,
        at_most=max(arguments.repetitions, 200),
        device=arguments.device,
        threads=arguments.threads,
        model=model_arguments(arguments, chosen.model),
        artifacts=arguments.artifacts or "",
    )
    return measure(
        Setup(
            chosen.model, request, chosen.targets, chosen.device, arguments.picture, arguments.seed
        )
    )
