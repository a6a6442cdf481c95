"""The pictures of a report, as SVG. The only module that imports matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from regionspot.benchmarks.peer_variants import RESEARCH
from regionspot.errors import InputError
from regionspot.runtime.graphs import required_graphs

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise InputError(
        f"plots need matplotlib ({error}): pip install 'regionspot[benchmark]'"
    ) from error

Row = Mapping[str, Any]
Rows = Sequence[Row]

WHOLE = "whole path"
INK, FAINT, PAPER = "#1f2430", "#d9dce3", "#ffffff"
PALETTE = (
    "#2b6cb0",
    "#dd6b20",
    "#2f855a",
    "#b83280",
    "#6b46c1",
    "#b7791f",
    "#4a5568",
    "#0987a0",
    "#9b2c2c",
    "#718096",
)
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regionspot",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "legend.frameon": False,
}
STAGE_ORDER = (*required_graphs(), "other")


def plots_of(reports: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(kind of the report that it belongs to, SVG) of every plot that the reports have
    figures for.
    """
    rows = {report["benchmark"]: report["rows"] for report in reports}
    drawings: list[tuple[str, Callable[[], Figure | None]]] = [
        ("latency", lambda: latency_by_regions(rows.get("latency", ()))),
        ("latency", lambda: stages(rows.get("latency", ()))),
        ("accuracy", lambda: pareto(rows.get("accuracy", ()), rows.get("latency", ()))),
        ("load", lambda: load_curve(rows.get("load", ()))),
        ("peers", lambda: peers_by_regions(rows.get("peers", ()))),
        ("peers", lambda: peer_stages(rows.get("peers", ()))),
        ("peers", lambda: peer_memory(rows.get("peers", ()))),
        ("train", lambda: training(rows.get("train", ()))),
    ]
    with matplotlib.rc_context(STYLE):
        for kind, draw in drawings:
            if (figure := draw()) is not None:
                yield kind, _svg(figure)


def latency_by_regions(rows: Rows) -> Figure | None:
    """The whole path against the number of regions, a line for each runtime and precision."""
    whole = [row for row in rows if row.get("graph") == WHOLE and "p50_ms" in row]
    return _lines(
        _grouped(whole, _target),
        "regions",
        "p50_ms",
        "Whole path, a picture's bytes to names",
        "regions",
        "p50, ms",
    )


def stages(rows: Rows) -> Figure | None:
    """Where the time of the whole path goes, at the most regions that all of its graphs were
    measured at.
    """
    whole = [row for row in rows if row.get("graph") == WHOLE and "p50_ms" in row]
    if not whole:
        return None
    regions = max(row["regions"] for row in whole)
    bars = {}
    for row in whole:
        if row["regions"] == regions:
            of_target = [
                other for other in rows if _target(other) == _target(row) and "p50_ms" in other
            ]
            parts = _stages_of(of_target, regions)
            bars[_target(row)] = parts | {"other": max(row["p50_ms"] - sum(parts.values()), 0.0)}
    return _stacked(bars, STAGE_ORDER, f"Where the time goes, {regions} regions", "p50, ms")


def pareto(accuracy: Rows, latency: Rows) -> Figure | None:
    """AP against the time of the whole path."""
    times = {_target(row): row for row in latency if row.get("graph") == WHOLE and "p50_ms" in row}
    points = [
        (_target(row), times[_target(row)]["p50_ms"], row["AP"])
        for row in accuracy
        if row.get("AP") is not None and _target(row) in times
    ]
    if not points:
        return None
    figure, axes = _axes("Accuracy against time", "p50 of the whole path, ms", "AP")
    for index, (name, p50_ms, ap) in enumerate(points):
        axes.plot(p50_ms, ap, "o", color=_colour(index), markersize=8, label=name)
    best, frontier = -1.0, []
    for _, p50_ms, ap in sorted(points, key=lambda point: (point[1], -point[2])):
        if ap > best:
            frontier.append((p50_ms, ap))
            best = ap
    axes.step(*zip(*frontier, strict=True), where="post", color=FAINT, zorder=0)
    axes.margins(x=0.15, y=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def load_curve(rows: Rows) -> Figure | None:
    """Latency against what is answered each second."""
    answered = [row for row in rows if row.get("p50_ms") is not None]
    if not answered:
        return None
    figure, axes = _axes("Latency against throughput", "answered a second", "ms")
    for index, (mode, group) in enumerate(_grouped(answered, lambda row: row["mode"]).items()):
        for quantile, style in (("p50_ms", "o-"), ("p99_ms", "o--")):
            group = sorted(group, key=lambda row: row["offered_per_s"] or row["concurrency"])
            label = f"{mode} loop, {quantile.removesuffix('_ms')}"
            axes.plot(
                [row["achieved_per_s"] for row in group],
                [row[quantile] for row in group],
                style,
                color=_colour(index),
                label=label,
            )
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.legend(loc="upper left")
    return figure


def peers_by_regions(rows: Rows) -> Figure | None:
    """Labels only, every way against the number of regions. What finds its regions itself is a
    level line.
    """
    measured = [row for row in rows if row.get("seconds") is not None and not row["masks"]]
    counts = sorted({row["regions"] for row in measured if row["regions"]})
    spread = [
        {**row, "regions": count}
        for row in measured
        for count in ([row["regions"]] if row["regions"] else counts)
    ]
    title = "A picture's bytes to classes and scores"
    return _lines(
        _grouped(spread, lambda row: row["way"]), "regions", "seconds", title, "regions", "seconds"
    )


def peer_stages(rows: Rows) -> Figure | None:
    """Where the time of the research formulation and of ours goes at the most regions."""
    measured = [
        row
        for row in rows
        if row.get("stages") and not row["masks"] and (row["ours"] or row["way"] == RESEARCH)
    ]
    if not measured:
        return None
    regions = max(row["regions"] or 0 for row in measured)
    bars = {row["way"]: row["stages"] for row in measured if row["regions"] == regions}
    order = list(dict.fromkeys(stage for parts in bars.values() for stage in parts))
    return _stacked(bars, order, f"Where the time goes, {regions} regions, labels only", "seconds")


def peer_memory(rows: Rows) -> Figure | None:
    """Peak memory of each way's process at the most regions."""
    measured = [row for row in rows if row.get("total_mb") is not None and not row["masks"]]
    if not measured:
        return None
    regions = max(row["regions"] or 0 for row in measured)
    bars = {
        row["way"]: {
            "above the model": row["peak_mb"],
            "model and libraries": row["total_mb"] - row["peak_mb"],
        }
        for row in measured
        if row["regions"] in (regions, None)
    }
    return _stacked(
        bars, ("model and libraries", "above the model"), f"Peak memory, {regions} regions", "MiB"
    )


def training(rows: Rows) -> Figure | None:
    """Pictures a second."""
    measured = {
        row["what"]: {"images/s": row["images_per_s"]}
        for row in rows
        if row.get("images_per_s") is not None
    }
    return _stacked(measured, ("images/s",), "Pictures a second", "images/s") if measured else None


def _stages_of(rows: Rows, regions: int) -> dict[str, float]:
    """p50_ms of each graph of the whole path, for one picture with so many regions."""
    return {
        row["graph"]: row["p50_ms"]
        for row in rows
        if row["graph"] in STAGE_ORDER and row["batch"] == 1 and row["regions"] in (None, regions)
    }


def _target(row: Row) -> str:
    return f"{row['runtime']} {row['precision']}"


def _grouped(rows: Rows, key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _axes(title: str, x: str, y: str, height: float = 3.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    axes.set_title(title, pad=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, linewidth=0.7)
    return figure, axes


def _lines(
    groups: Mapping[str, Rows], x: str, y: str, title: str, x_label: str, y_label: str
) -> Figure | None:
    """A line for each group on logarithmic axes, named at its right end."""
    if not groups:
        return None
    figure, axes = _axes(title, x_label, y_label, height=4.2)
    for index, (name, rows) in enumerate(groups.items()):
        ordered = sorted(rows, key=lambda row: row[x])
        axes.plot(
            [row[x] for row in ordered],
            [row[y] for row in ordered],
            "o-",
            color=_colour(index),
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({row[x] for rows in groups.values() for row in rows}))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10 in place of powers of ten."""
    if axis.axis_name == "y":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _stacked(
    bars: Mapping[str, Mapping[str, float]], order: Sequence[str], title: str, x_label: str
) -> Figure:
    """A horizontal bar for each name, made of its parts, with the sum at its end."""
    figure, axes = _axes(title, x_label, "", height=1.5 + 0.42 * len(bars))
    names = list(bars)[::-1]
    left = [0.0] * len(names)
    for index, part in enumerate(order):
        widths = [bars[name].get(part, 0.0) for name in names]
        if any(widths):
            axes.barh(names, widths, left=left, height=0.62, color=_colour(index), label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, end in zip(names, left, strict=True):
        axes.annotate(
            f"{end:.3g}" if end < 1000 else f"{end:.0f}",
            (end, name),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.grid(False, axis="y")
    axes.margins(x=0.1)
    if len(order) > 1:
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _svg(figure: Figure) -> str:
    """Without the XML header, so that a page can hold it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg )", "", text.getvalue(), count=1, flags=re.DOTALL)
