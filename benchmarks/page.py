"""A report as one page that needs no other file: plots, tables and conditions."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from regionspot.benchmarks.kinds import KINDS, reports_in, table_of
from regionspot.benchmarks.plots import plots_of
from regionspot.benchmarks.tables import conditions_of

STYLE = """
:root { color-scheme: light; --ink: #1f2430; --soft: #5b6475; --line: #e3e6ec; --paper: #fff; --back: #f5f6f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header, section { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { margin: 0 0 4px; font-size: 26px; }
h2 { margin: 0 0 4px; font-size: 20px; }
p { margin: 0 0 14px; color: var(--soft); max-width: 78ch; }
nav a { margin-right: 16px; color: #2b6cb0; text-decoration: none; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 22px 24px; margin: 22px 0; }
.plots { display: flex; flex-wrap: wrap; gap: 18px; margin-bottom: 10px; }
.plots figure { margin: 0; flex: 1 1 460px; min-width: 0; max-width: 620px; }
.plots svg { width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; white-space: nowrap; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; }
tbody tr:hover { background: var(--back); }
details { margin-top: 14px; color: var(--soft); }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13.5px; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def html_page(report: Mapping[str, Any]) -> str:
    """Of one report, or of a collection.

    Raises:
        InputError: not a report, or matplotlib is not installed.
    """
    reports = list(reports_in(report))
    plots: dict[str, list[str]] = {}
    for kind, svg in plots_of(reports):
        plots.setdefault(kind, []).append(svg)
    sections = "\n".join(_section(one, plots.get(one["benchmark"], [])) for one in reports)
    links = "".join(f'<a href="#{one["benchmark"]}">{_escaped(KINDS[one["benchmark"]].title)}</a>' for one in reports)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>RegionSpot benchmarks</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>RegionSpot benchmarks</h1><p>{_escaped(_machine(reports))}</p><nav>{links}</nav></header>\n"
        f"{sections}\n</body>\n</html>\n"
    )


def _machine(reports: list[Mapping[str, Any]]) -> str:
    """Where it was measured, in one line."""
    conditions = reports[0].get("conditions", {}) if reports else {}
    names = ("processor", "cpus", "regionspot", "commit")
    return " · ".join(f"{name} {conditions[name]}" for name in names if conditions.get(name) is not None)


def _section(report: Mapping[str, Any], plots: list[str]) -> str:
    kind = KINDS[report["benchmark"]]
    figures = "".join(f"<figure>{svg}</figure>" for svg in plots)
    details = "".join(
        f"<dt>{_escaped(name)}</dt><dd>{_escaped(value)}</dd>" for name, value in conditions_of(report).items()
    )
    return (
        f'<section id="{report["benchmark"]}"><div class="card"><h2>{_escaped(kind.title)}</h2>'
        f'<p>{_escaped(kind.explanation)}</p><div class="plots">{figures}</div>'
        f'<div class="table">{"".join(_table(report))}</div>'
        f"<details><summary>Conditions</summary><dl>{details}</dl></details></div></section>"
    )


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    columns, rows = table_of(report)
    kinds = ["number" if column.form else "text" for column in columns]
    headings = zip(columns, kinds, strict=True)
    yield "<table><thead><tr>"
    yield from (f'<th class="{kind}">{_escaped(column.heading)}</th>' for column, kind in headings)
    yield "</tr></thead><tbody>"
    for cells in rows:
        texts = "".join(f'<td class="{kind}">{_escaped(one)}</td>' for one, kind in zip(cells, kinds, strict=True))
        yield f"<tr>{texts}</tr>"
    yield "</tbody></table>"


def _escaped(text: str) -> str:
    return html.escape(str(text))
