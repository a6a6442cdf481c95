"""What an export or a comparison came to, as tables that people read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regionspot.export.divergence import Divergence, TensorRow
from regionspot.export.parity import EndToEndResult, ParityResult
from regionspot.files import in_units
from regionspot.runtime.artifacts import GraphEntry
from regionspot.runtime.engine_file import FLAVOURS, read_sidecar
from regionspot.tables import text_table

VERDICTS = {True: "passed", False: "FAILED", None: "not run"}


@dataclass(frozen=True)
class Report:
    """What an export came to: an entry for each step, in their order, and rows of the whole
    pipeline.
    """

    entries: tuple[GraphEntry, ...]
    end_to_end: tuple[Mapping[str, Any], ...]

    @property
    def passed(self) -> bool:
        """Whether nothing differs from the model; what could not be run here does not count."""
        return not any(entry.passed is False for entry in self.entries) and not any(
            row["passed"] is False for row in self.end_to_end
        )


def in_words(entry: GraphEntry) -> str:
    """How an artefact came out, in one line."""
    if entry.passed is None:
        return (
            f"made in {entry.build_s:.1f} s, {in_units(entry.size_bytes)}; not compared: "
            f"{entry.reason}"
        )
    if entry.max_abs_diff is None:
        return f"FAILED: {entry.reason}"
    figures = (
        f"max|Δ| {entry.max_abs_diff:.1e}, cosine {entry.cosine:.6f}, SQNR {entry.sqnr_db:.1f} dB"
    )
    verdict = "passed" if entry.passed else f"FAILED: {entry.reason}"
    return f"{in_units(entry.size_bytes)} in {entry.build_s:.1f} s; {figures}: {verdict}"


def layer_figures(report: Report, directory: Path) -> dict[str, Mapping[str, Any]]:
    """What each engine came to, see `regionspot.export.trt_layers.LayerReport`: by graph, or by
    graph, format and precision where a graph has several engines.
    """
    made = [
        entry for entry in report.entries if entry.format in FLAVOURS and entry.file is not None
    ]
    counts = Counter(entry.name for entry in made)
    return {
        entry.name if counts[entry.name] == 1 else entry.title: read_sidecar(
            directory / str(entry.file)
        ).layers
        for entry in made
    }


def format_report(report: Report) -> str:
    """Aligned tables of all graphs and of the whole pipelines, and why what failed did."""
    header = (
        "graph",
        "format",
        "precision",
        "size",
        "build s",
        "max|Δ|",
        "cosine",
        "SQNR dB",
        "verdict",
    )
    lines = [text_table(header, [_row(entry) for entry in report.entries])]
    if report.end_to_end:
        columns = (
            "end to end",
            "precision",
            "images",
            "regions",
            "top-1 agreement",
            "score difference",
            "verdict",
        )
        lines += ["", text_table(columns, [_pipeline_row(row) for row in report.end_to_end])]
    failed = [f"{entry.title}: {entry.reason}" for entry in report.entries if entry.passed is False]
    failed += [
        f"end to end ({row['format']}, {row['precision']}): {row['reason']}"
        for row in report.end_to_end
        if row["passed"] is False
    ]
    not_run = dict.fromkeys(entry.reason for entry in report.entries if entry.passed is None)
    lines += ["", *(f"FAILED {line}" for line in failed)] if failed else []
    lines += ["", *(f"not run: {reason}" for reason in not_run)] if not_run else []
    return "\n".join(lines)


def format_comparison(graphs: Mapping[str, ParityResult], whole: EndToEndResult | None) -> str:
    """Tables of a comparison's graphs and of the whole pipeline, and why what failed did."""
    header = ("graph", "max|Δ|", "cosine", "SQNR dB", "tolerance", "verdict")
    rows = []
    for name, parity in graphs.items():
        worst = parity.worst
        figures = _figures(
            *((worst.max_abs_diff, worst.cosine, worst.sqnr_db) if worst else (None, None, None))
        )
        rows.append((name, *figures, parity.tolerance.name, VERDICTS[parity.passed]))
    lines = [text_table(header, rows)]
    reasons = {name: parity.reason for name, parity in graphs.items() if parity.reason}
    if whole is not None:
        columns = (
            "end to end",
            "images",
            "regions",
            "top-1 agreement",
            "score difference",
            "verdict",
        )
        lines += ["", text_table(columns, [("A to B", *_pipeline_cells(whole.to_json()))])]
        reasons |= {"end to end": whole.reason} if whole.reason else {}
    lines += ["", *(f"{name}: {reason}" for name, reason in reasons.items())] if reasons else []
    return "\n".join(lines)


def format_divergences(graphs: Mapping[str, Divergence | str]) -> str:
    """For each graph a table of the first tensors that breach, and the largest drop of the SQNR;
    or why it could not be told.
    """
    header = ("tensor", "operator", "max|Δ|", "SQNR dB", "breach")
    lines = []
    for name, found in graphs.items():
        if isinstance(found, str):
            lines += [f"{name}: not run: {found}", ""]
            continue
        lines.append(
            f"{name}: {found.compared} tensors compared in their order, {found.left_out} left out, "
            f"tolerance {found.tolerance.name}"
        )
        if found.first:
            rows = [(*_tensor_cells(row), "; ".join(row.breaches)) for row in found.first]
            lines.append(text_table(header, rows))
        else:
            lines.append("no tensor breaches the tolerance")
        if found.largest_drop is not None:
            tensor, op, _, sqnr = _tensor_cells(found.largest_drop)
            drop = found.largest_drop.drop_db
            lines.append(
                f"largest drop of the SQNR: {drop:.1f} dB, to {sqnr} dB, at {tensor} ({op})"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _tensor_cells(row: TensorRow) -> tuple[str, str, str, str]:
    """Name, operator, largest difference and SQNR."""
    if row.difference is None:
        return row.name, row.op, "–", "–"
    difference = row.difference
    return row.name, row.op, f"{difference.max_abs_diff:.2e}", f"{difference.sqnr_db:.1f}"


def _row(entry: GraphEntry) -> Sequence[str]:
    figures = _figures(entry.max_abs_diff, entry.cosine, entry.sqnr_db)
    size = in_units(entry.size_bytes) if entry.file else "–"
    return (
        entry.name,
        entry.format,
        entry.precision,
        size,
        f"{entry.build_s:.1f}",
        *figures,
        VERDICTS[entry.passed],
    )


def _figures(max_abs_diff: float | None, cosine: float | None, sqnr_db: float | None) -> list[str]:
    pairs = ((max_abs_diff, ".2e"), (cosine, ".6f"), (sqnr_db, ".1f"))
    return ["–" if figure is None else format(figure, how) for figure, how in pairs]


def _pipeline_row(row: Mapping[str, Any]) -> Sequence[str]:
    return row["format"], row["precision"], *_pipeline_cells(row)


def _pipeline_cells(row: Mapping[str, Any]) -> Sequence[str]:
    agreement, difference = row["top1_agreement"], row["score_difference"]
    return (
        str(row["images"]),
        str(row["regions"]),
        "–" if agreement is None else f"{agreement:.4f}",
        "–" if difference is None else f"{difference:.2e}",
        VERDICTS[row["passed"]],
    )
