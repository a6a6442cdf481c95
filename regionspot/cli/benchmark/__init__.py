"""`regionspot-benchmark KIND ...`: what each artefact costs and gains on this machine. One file for
each kind.

A kind's file has `SUMMARY`, `add_options(parser)` and `run(arguments) -> report`. A report is plain
JSON values: `benchmark`, the kind's name; `conditions`, without which its figures mean nothing;
`rows`, one measurement each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from regionspot.cli.benchmark.output import add_output_options, check_report, deliver
from regionspot.cli.main import unknown_name
from regionspot.errors import InputError

KINDS = ("latency", "accuracy", "load", "peers", "train", "compare", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one kind; the exit status: 0, or 1 if a condition of --fail-if holds.

    Raises:
        InputError: no kind has that name.
    """
    arguments = build_parser(list(argv or ())).parse_args(argv)
    check_report(arguments)
    return deliver(arguments.run(arguments), arguments)


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Raises InputError if what `argv` begins with is none of KINDS."""
    if argv and not argv[0].startswith("-") and argv[0] not in KINDS:
        raise InputError(unknown_name("benchmark", argv[0], KINDS))
    parser = argparse.ArgumentParser(
        prog="regionspot-benchmark",
        description="Measure what each runtime and precision of a model costs and gains on this "
        "machine.",
    )
    commands = parser.add_subparsers(metavar="KIND", required=True)
    for kind in KINDS:
        module = import_module(f"regionspot.cli.benchmark.{kind}")
        command = commands.add_parser(kind, help=module.SUMMARY, description=module.__doc__)
        module.add_options(command)
        add_output_options(command)
        command.set_defaults(run=module.run)
    return parser
