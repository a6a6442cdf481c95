"""The kinds of reports: how each is shown, what tells one row from another, and which figures are
compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regionspot.errors import InputError

COLLECTION = "report"
"""A report of several reports, in `reports`."""


@dataclass(frozen=True)
class Column:
    """A column of a table: what it shows of a row, its heading, and how a number is written."""

    key: str
    heading: str
    form: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of report.

    Args:
        title, explanation: for readers.
        identity: what tells one row from another.
        columns: of its table, after those of the identity.
        compared: figures that `compare` looks at, of those in the rows.
    """

    title: str
    explanation: str
    identity: tuple[Column, ...]
    columns: tuple[Column, ...]
    compared: tuple[str, ...] = ()


_TARGET = (Column("runtime", "runtime"), Column("precision", "precision"))
_TIMES = (
    Column("p50_ms", "p50 ms", ".2f"),
    Column("p90_ms", "p90 ms", ".2f"),
    Column("p99_ms", "p99 ms", ".2f"),
)
_NOTE = Column("note", "note")

KINDS = {
    "latency": Kind(
        "Latency",
        "Time and memory of each graph and of the whole path. Roofline is the share of the time "
        "that this machine's measured rates of a matrix product and of a copy would leave of it. "
        "Native: our own kernels run the decoder.",
        (
            *_TARGET,
            Column("graph", "graph"),
            Column("batch", "batch", "d"),
            Column("regions", "regions", "d"),
        ),
        (
            Column("n", "n", "d"),
            *_TIMES,
            Column("per_second", "images/s", ".2f"),
            Column("peak_mb", "peak MiB", ".0f"),
            Column("total_mb", "process MiB", ".0f"),
            Column("device_mb", "GPU MiB", ".0f"),
            Column("gflop", "GFLOP", ".2f"),
            Column("gflops", "GFLOP/s", ".1f"),
            Column("roofline", "roofline", ".0%"),
            Column("native", "native"),
            _NOTE,
        ),
        ("p50_ms", "p99_ms", "peak_mb", "total_mb"),
    ),
    "accuracy": Kind(
        "Accuracy",
        "Average precision of each runtime and precision on the same pictures and regions; dAP is "
        "the distance to PyTorch in single precision, agreement the share of regions whose best "
        "class is the same.",
        _TARGET,
        (
            Column("AP", "AP", ".3f"),
            Column("AP50", "AP50", ".3f"),
            Column("AP75", "AP75", ".3f"),
            Column("AP_base", "base", ".2f"),
            Column("AP_novel", "novel", ".2f"),
            Column("dAP", "dAP", ".4f"),
            Column("agreement", "agreement", ".4f"),
            Column("max_score_difference", "score diff", ".1e"),
            Column("worst_class", "class that moved most"),
            Column("worst_class_dAP", "by", ".3f"),
            Column("seconds", "seconds", ".1f"),
            _NOTE,
        ),
        ("AP", "AP50", "AP75", "AP_base", "AP_novel", "agreement"),
    ),
    "load": Kind(
        "Load",
        "A running server under load. Closed: so many workers, each asking again when it is "
        "answered. Open: requests due in a Poisson process, latency counted from when each was "
        "due.",
        (
            Column("mode", "loop"),
            Column("regions", "regions"),
            Column("concurrency", "workers", "d"),
            Column("share", "share", ".2f"),
        ),
        (
            Column("offered_per_s", "offered/s", ".1f"),
            Column("achieved_per_s", "answered/s", ".1f"),
            Column("n", "n", "d"),
            Column("errors", "errors", "d"),
            *_TIMES,
            Column("saturated", "saturated"),
        ),
        ("achieved_per_s", "p50_ms", "p99_ms", "errors"),
    ),
    "peers": Kind(
        "Peers",
        "The same picture, boxes and weights by other ways and by ours, from a JPEG's bytes to "
        "classes and scores, and to run-length masks. Faster and memory are against the research "
        "formulation at the same regions.",
        (Column("way", "way"), Column("regions", "regions", "d"), Column("masks", "masks")),
        (
            Column("seconds", "seconds", ".3f"),
            Column("speedup", "faster", ".2f"),
            Column("peak_mb", "peak MiB", ".0f"),
            Column("total_mb", "process MiB", ".0f"),
            Column("memory_ratio", "of research", ".2f"),
            Column("gflop", "GFLOP", ".0f"),
            Column("max_score_difference", "score diff", ".1e"),
            Column("repetitions", "n", "d"),
            _NOTE,
        ),
        ("seconds", "total_mb"),
    ),
    "train": Kind(
        "Training",
        "Extraction of features, and training of the head from cached features against encoding "
        "every picture anew.",
        (Column("what", "what"), Column("runtime", "runtime"), Column("batch", "batch", "d")),
        (
            Column("n", "n", "d"),
            Column("images_per_s", "images/s", ".2f"),
            Column("regions_per_s", "regions/s", ".1f"),
            Column("speedup", "faster", ".2f"),
            Column("peak_mb", "peak MiB", ".0f"),
            _NOTE,
        ),
        ("images_per_s",),
    ),
    "gpu_check": Kind(
        "GPU check",
        "What works on a GPU, and how fast each graph and the whole path are there. Roofline is "
        "the share of the time that this GPU's measured rates of a matrix product and of a copy "
        "would leave of it.",
        (
            Column("stage", "stage"),
            *_TARGET,
            Column("graph", "graph"),
            Column("batch", "batch", "d"),
            Column("regions", "regions", "d"),
        ),
        (
            Column("result", "result"),
            Column("n", "n", "d"),
            *_TIMES[:2],
            Column("per_second", "images/s", ".1f"),
            Column("device_mb", "GPU MiB", ".0f"),
            Column("gflop", "GFLOP", ".1f"),
            Column("gflops", "GFLOP/s", ".0f"),
            Column("roofline", "roofline", ".0%"),
            _NOTE,
        ),
        ("p50_ms", "device_mb"),
    ),
    "mask_encoding": Kind(
        "Masks",
        "SAM's mask logits to run-length masks at the picture's size: Sam.postprocess_masks, "
        "threshold and pycocotools against ours; `differ` counts masks that are not the same.",
        (Column("logits", "logits"),),
        (
            Column("segment_anything_s", "theirs s", ".3f"),
            Column("regionspot_s", "ours s", ".3f"),
            Column("speedup", "faster", ".1f"),
            Column("segment_anything_peak_mb", "theirs MiB", ".0f"),
            Column("regionspot_peak_mb", "ours MiB", ".0f"),
            Column("different", "differ", "d"),
        ),
        ("segment_anything_s", "regionspot_s", "speedup"),
    ),
    "compare": Kind(
        "Comparison",
        "Figures of two reports, row by row.",
        (Column("kind", "benchmark"), Column("row", "row"), Column("figure", "figure")),
        (
            Column("old", "old", ".4g"),
            Column("new", "new", ".4g"),
            Column("ratio", "new / old", ".3f"),
            _NOTE,
        ),
    ),
}


def reports_in(report: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The report itself, or those that a collection holds.

    Raises:
        InputError: not a report that this release knows.
    """
    if not isinstance(report, Mapping) or report.get("benchmark") not in (*KINDS, COLLECTION):
        raise InputError(
            "this is no report of regionspot-benchmark: it does not say of which benchmark it is"
        )
    if report["benchmark"] != COLLECTION:
        yield report
        return
    for one in report["reports"]:
        yield from reports_in(one)


def title_of(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What a row is of, in a few words: "latency openvino int8 region_head 1 100"."""
    kind = report["benchmark"]
    named = [cell(row, column) for column in KINDS[kind].identity]
    return " ".join([kind, *(text for text in named if text)])


def cell(row: Mapping[str, Any], column: Column) -> str:
    """A figure as it is written; nothing for what a row does not have."""
    value = row.get(column.key)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and column.form:
        return format(value, column.form)
    return str(value)


def table_of(report: Mapping[str, Any]) -> tuple[list[Column], list[list[str]]]:
    """The columns that have anything to show, and the cells of each row."""
    kind = KINDS[report["benchmark"]]
    columns = [
        column
        for column in (*kind.identity, *kind.columns)
        if any(cell(row, column) for row in report["rows"])
    ]
    return columns, [[cell(row, column) for column in columns] for row in report["rows"]]
