"""Put several reports that --json wrote into one, and on one page: what is accurate beside what is
fast.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SUMMARY = "several reports on one page"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help="JSON of a report")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The collection. Raises InputError if a file is no report."""
    from regionspot.benchmarks.comparison import collect

    return collect(arguments.reports)
