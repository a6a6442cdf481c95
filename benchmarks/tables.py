"""Reports as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from regionspot.benchmarks.kinds import KINDS, reports_in, table_of
from regionspot.tables import markdown_table, text_table

Conditions = Mapping[str, Any]


def text(report: Mapping[str, Any]) -> str:
    """Every table, for a terminal."""
    return "\n\n".join(
        f"{KINDS[one['benchmark']].title}\n{text_table(*_cells(one))}" for one in reports_in(report)
    )


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
                found[prefix + name] = (
                    ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                )

    add("", report.get("conditions", {}))
    return found


def _markdown_section(report: Mapping[str, Any]) -> Iterator[str]:
    kind = KINDS[report["benchmark"]]
    yield from (f"## {kind.title}", "", kind.explanation, "")
    yield markdown_table(*_cells(report))
    yield ""
    yield from (f"- {name}: {value}" for name, value in conditions_of(report).items())
    yield ""


def _cells(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]], set[int]]:
    """Returns the header, the rows, and which columns are numbers, aligned to the right."""
    columns, rows = table_of(report)
    numbers = {index for index, column in enumerate(columns) if column.form}
    return [column.heading for column in columns], rows, numbers
