"""A report as one page that needs no other file: plots, tables and conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from regionspot.benchmarks.kinds import KINDS, reports_in, table_of
from regionspot.benchmarks.plots import plots_of
from regionspot.benchmarks.tables import conditions_of

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def html_page(report: Mapping[str, Any]) -> str:
    """Returns the page of one report, or of a collection.

    Raises:
        InputError: not a report.
    """
    reports = list(reports_in(report))
    plots: dict[str, list[str]] = {}
    for kind, svg in plots_of(reports):
        plots.setdefault(kind, []).append(svg)
    sections = [_section(one, plots.get(one["benchmark"], [])) for one in reports]
    templates = FileSystemLoader(TEMPLATE.parent)
    environment = Environment(
        loader=templates, autoescape=True, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(TEMPLATE.name).render(
        machine=_machine(reports), sections=sections
    )


def _machine(reports: Sequence[Mapping[str, Any]]) -> str:
    """Where it was measured, in one line."""
    conditions = reports[0].get("conditions", {}) if reports else {}
    names = ("processor", "cpus", "regionspot", "commit")
    return " · ".join(
        f"{name} {conditions[name]}" for name in names if conditions.get(name) is not None
    )


def _section(report: Mapping[str, Any], plots: Sequence[str]) -> dict[str, Any]:
    """Returns what the template shows of a report."""
    columns, rows = table_of(report)
    return {
        "name": report["benchmark"],
        "kind": KINDS[report["benchmark"]],
        "plots": plots,
        "columns": columns,
        "rows": rows,
        "conditions": conditions_of(report),
    }
