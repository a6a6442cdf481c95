"""Where a benchmark's report goes, the same options for every kind."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from regionspot.cli.outputs import (
    check_outputs,
    json_bytes,
    model_files,
    table_stream,
    write_output,
)

GATE_FAILED = 1


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --json, --html, --markdown and --fail-if."""
    output = parser.add_argument_group("report")
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures with their conditions"
    )
    output.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page with plots, which needs no other file",
    )
    output.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables in Markdown"
    )
    output.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="EXPR",
        help="exit with 1 if a row's figure is so, such as 'dAP>0.1' or 'p99_ms>=50'; may be "
        "given several times",
    )


def check_report(arguments: argparse.Namespace) -> None:
    """Refuse reports that would overwrite what the benchmark reads, or each other, or cannot be
    made here.

    Raises:
        InputError: an output is an input, another output, or cannot be written.
        ModuleNotFoundError: a page is asked for, and the extra `benchmark` is not installed.
    """
    outputs = {f"--{name}": getattr(arguments, name) for name in ("json", "html", "markdown")}
    read = {
        f"--{name}": getattr(arguments, name, None) for name in ("data", "proposals", "picture")
    }
    compared = [getattr(arguments, name) for name in ("old", "new") if hasattr(arguments, name)]
    reports = [*compared, *getattr(arguments, "reports", ())]
    check_outputs(outputs, read | {"a report": reports, **model_files(arguments)})
    if arguments.html:
        import_module("regionspot.benchmarks.page")  # what it needs may not be installed


def deliver(report: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """Write what was asked for, print the report's tables, and judge it; the exit status."""
    from regionspot.benchmarks.gates import check
    from regionspot.benchmarks.tables import markdown, text

    if arguments.json:
        write_output(arguments.json, json_bytes(report))
    if arguments.markdown:
        write_output(arguments.markdown, markdown(report).encode("utf-8", "backslashreplace"))
    if arguments.html:
        from regionspot.benchmarks.page import html_page

        write_output(arguments.html, html_page(report).encode("utf-8", "backslashreplace"))
    print(text(report), file=table_stream(arguments.json, arguments.markdown, arguments.html))
    failures = [
        failure for expression in arguments.fail_if for failure in check(expression, report)
    ]
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return GATE_FAILED if failures else 0
