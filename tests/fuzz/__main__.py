"""Fuzzing: thousands of strange inputs through the public entry points, each in a bounded child
process.

Run all with `make fuzz`, or some with

    python -m tests.fuzz --kind images --kind prompts --cases 500

A case is decided by the seed, its kind and its number alone. A failure is shown with the number;
run it again with

    python -m tests.fuzz --kind images --case 1234 --keep /tmp/case

which leaves the files that the case wrote under /tmp/case. An input may be refused with an
`InputError` or an `ArtifactError` of one line, or be accepted with an answer that keeps every
invariant of its kind. A crash, a hang, too much memory, another exception and an answer that breaks
an invariant are failures; the exit status is then 1.

Each kind is a `Target` in a module of its own; `kinds.py` lists them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.kinds import KINDS
from tests.fuzz.parent import run_kinds
from tests.fuzz.report import print_report, write_json
from tests.fuzz.target import SEED


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    kinds = arguments.kind or list(KINDS)
    if arguments.case is not None:
        ranges = {kind: range(arguments.case, arguments.case + 1) for kind in kinds}
    else:
        ranges = {kind: range(arguments.cases or KINDS[kind].cases) for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(arguments.keep or scratch)
        reports = run_kinds(directory, ranges, arguments.workers, arguments.seed)
    print_report(reports, arguments.seed)
    if arguments.json:
        write_json(arguments.json, reports, arguments.seed)
        print(f"wrote {arguments.json}")
    return int(any(report.failures for report in reports))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Gives strange inputs to regionspot."
    )
    parser.add_argument(
        "--kind",
        action="append",
        choices=list(KINDS),
        help="this kind; may be repeated (default: all)",
    )
    parser.add_argument(
        "--cases",
        type=int,
        metavar="N",
        help="so many of each kind (default: those of `make fuzz`)",
    )
    parser.add_argument("--case", type=int, metavar="N", help="this one alone")
    parser.add_argument(
        "--seed",
        type=int,
        default=SEED,
        help="another seed gives other cases (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument("--keep", metavar="DIR", help="write the inputs there, and leave the last")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
