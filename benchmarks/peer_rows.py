"""What was measured of the ways to recognise regions, as rows of a report and as its summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.benchmarks.peer_variants import CLIP_CROPS, DETECTORS, PEERS, RESEARCH, variant_name
from regionspot.masks import decode_rle

MEASURED = ("seconds", "peak_mb", "total_mb", "load_peak_mb")
DETECTOR_NOTE = (
    "finds regions itself, so its time does not depend on their number; boxes without masks"
)
CROPS_NOTE = "masks by segment_anything's predictor"

Row = dict[str, Any]


@dataclass(frozen=True)
class VariantResult:
    """One way with or without masks: what its process printed.

    Args:
        counts: numbers of regions that it was asked about; None of a detector, which finds them
            itself.
        lines: of a number of regions where they have "regions", else of the process as a whole.
    """

    way: str
    draw: bool
    counts: Sequence[int | None]
    lines: Sequence[Mapping[str, Any]]

    def rows(self) -> list[Row]:
        """One for each number of regions; without figures, and with a note, where there are
        none.
        """
        of_process: dict[str, Any] = {}
        for line in self.lines:
            of_process |= {} if "regions" in line else line
        found = {line["regions"]: line for line in self.lines if "regions" in line}
        return [
            self._row(count, found.get(count, {"note": of_process.get("note", "")}), of_process)
            for count in self.counts
        ]

    def _row(
        self, count: int | None, line: Mapping[str, Any], of_process: Mapping[str, Any]
    ) -> Row:
        return {
            "way": self.way,
            "ours": self.way not in PEERS,
            "regions": count,
            "masks": self.draw,
            **{name: line.get(name) for name in MEASURED},
            "repetitions": line.get("repetitions", 0),
            "gflop": of_process.get("gflop", {}).get(str(count)),
            "stages": line.get("stages", {}),
            "note": line.get("note") or self._note(),
        }

    def _note(self) -> str:
        if self.way in DETECTORS:
            return DETECTOR_NOTE
        return CROPS_NOTE if self.way == CLIP_CROPS and self.draw else ""


def rows_of(measured: Sequence[VariantResult], folder: Path) -> list[Row]:
    """All rows, each beside the research pipeline's of the same regions and masks, where that was
    measured.

    `speedup` and `memory_ratio` (of total_mb) are in comparison with it. `max_score_difference`
    from it, and `mask_difference`, the share of pixels of the worst mask, are given of ways that
    compute the same.

    Args:
        folder: where the processes wrote what they found.
    """
    rows = [row for one in measured for row in one.rows()]
    research = {
        (row["regions"], row["masks"]): row
        for row in rows
        if row["way"] == RESEARCH and row["seconds"]
    }
    for row in rows:
        reference = research.get((row["regions"], row["masks"]))
        row |= {
            "speedup": _ratio(reference, row, "seconds"),
            "memory_ratio": _ratio(row, reference, "total_mb"),
        }
        row |= (
            _differences(row, folder)
            if reference
            else {"max_score_difference": None, "mask_difference": None}
        )
    return rows


def _ratio(above: Row | None, below: Row | None, name: str) -> float | None:
    if above is None or below is None or above[name] is None or not below[name]:
        return None
    ratio: float = above[name] / below[name]
    return ratio


def _differences(row: Row, folder: Path) -> dict[str, float | None]:
    found: dict[str, float | None] = {"max_score_difference": None, "mask_difference": None}
    if row["seconds"] is None or not (row["ours"] or row["way"] == RESEARCH):
        return found
    of_row, of_research = (folder / _results(way, row) for way in (row["way"], RESEARCH))
    found["max_score_difference"] = float(
        np.abs(np.load(f"{of_row}.npy") - np.load(f"{of_research}.npy")).max()
    )
    masks, references = (
        json.loads(Path(f"{path}.json").read_text()) for path in (of_row, of_research)
    )
    pairs = zip(masks, references, strict=True)
    shares = [float((decode_rle(mask) ^ decode_rle(reference)).mean()) for mask, reference in pairs]
    found["mask_difference"] = max(shares, default=None)
    return found


def _results(way: str, row: Row) -> str:
    return f"{variant_name(way, row['masks'])}-{row['regions']}"


def summary(rows: Sequence[Row], regions: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Number of regions -> the figures of all ways, "labels_only" and "with_masks"; the former also
    directly.
    """
    found = {}
    for count in regions:
        labels_only, with_masks = (_of_count(rows, count, draw) for draw in (False, True))
        direct = {
            name: labels_only[name]
            for name in (f"{RESEARCH}_s", "ours_s", "peak_mb")
            if name in labels_only
        }
        found[str(count)] = {"labels_only": labels_only, "with_masks": with_masks, **direct}
    return found


def _of_count(rows: Sequence[Row], count: int, draw: bool) -> dict[str, Any]:
    """A detector's figures stand in every number of regions."""
    chosen = [row for row in rows if row["masks"] == draw and row["regions"] in (count, None)]
    return {
        **{f"{row['way']}_s": row["seconds"] for row in chosen if not row["ours"]},
        "ours_s": {row["way"]: row["seconds"] for row in chosen if row["ours"]},
        "peak_mb": {row["way"]: row["peak_mb"] for row in chosen},
        "total_mb": {row["way"]: row["total_mb"] for row in chosen},
    }
