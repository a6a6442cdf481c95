"""Reports as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from regionspot.benchmarks.kinds import KINDS, reports_in, table_of

Conditions = Mapping[str, Any]


def text(report: Mapping[str, Any]) -> str:
    """Every table, for a terminal."""
    return "\n\n".join("\n".join(_text_table(one)) for one in reports_in(report))


def markdown(report: Mapping[str, Any]) -> str:
    """Every table with its explanation and conditions."""
    return "\n".join(line for one in reports_in(report) for line in _markdown_section(one))


def conditions_of(report: Mapping[str, Any]) -> dict[str, str]:
    """Name -> value of what a report was measured under, nested ones with a dot between."""
    found: dict[str, str] = {}

    def add(prefix: str, conditions: Conditions) -> None:
        for name, value in conditions.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{name}.", value)
            else:
                found[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    add("", report.get("conditions", {}))
    return found


def _text_table(report: Mapping[str, Any]) -> Iterator[str]:
    columns, rows = table_of(report)
    cells = [[column.heading for column in columns], *rows]
    widths = [max(map(len, texts)) for texts in zip(*cells, strict=True)]
    yield KINDS[report["benchmark"]].title
    for row in cells:
        padded = [
            f"{one:>{width}}" if column.form else f"{one:<{width}}"
            for one, width, column in zip(row, widths, columns, strict=True)
        ]
        yield "  ".join(padded).rstrip()


def _markdown_section(report: Mapping[str, Any]) -> Iterator[str]:
    kind = KINDS[report["benchmark"]]
    columns, rows = table_of(report)
    yield from (f"## {kind.title}", "", kind.explanation, "")
    yield _markdown_row([column.heading for column in columns])
    yield _markdown_row(["---:" if column.form else "---" for column in columns])
    yield from map(_markdown_row, rows)
    yield ""
    yield from (f"- {name}: {value}" for name, value in conditions_of(report).items())
    yield ""


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
