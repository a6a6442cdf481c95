"""Compare two reports that --json wrote, row by row: what became slower, larger or less accurate.
For --fail-if each figure has its ratio, new by old, and its distance: 'p50_ms_ratio>1.1',
'dAP>0.1'.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SUMMARY = "two reports, figure by figure"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, metavar="OLD", help="a report's JSON")
    parser.add_argument("new", type=Path, metavar="NEW", help="another one of the same kind")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The comparison. Raises InputError if a file is no report, or they have nothing in common."""
    from regionspot.benchmarks.comparison import compare, load_report

    return compare(load_report(arguments.old), load_report(arguments.new))
