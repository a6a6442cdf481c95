"""Where a benchmark's report goes, the same options for every kind."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GATE_FAILED = 1


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --json, --html, --markdown and --fail-if."""
    output = parser.add_argument_group("report")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the figures with their conditions")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, which needs no other file")
    output.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables in Markdown")
    output.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="EXPR",
        help="exit with 1 if a row's figure is so, such as 'dAP>0.1' or 'p99_ms>=50'; may be given several times",
    )


def deliver(report: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """Print the report's tables, write what was asked for, and judge it; the exit status."""
    from regionspot.benchmarks.gates import check
    from regionspot.benchmarks.page import html_page
    from regionspot.benchmarks.tables import markdown, text
    from regionspot.files import write_atomically

    print(text(report))
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    if arguments.markdown:
        write_atomically(arguments.markdown, markdown(report).encode())
    if arguments.html:
        write_atomically(arguments.html, html_page(report).encode())
    failures = [failure for expression in arguments.fail_if for failure in check(expression, report)]
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return GATE_FAILED if failures else 0
