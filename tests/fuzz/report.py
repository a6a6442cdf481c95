"""The table that is printed and the figures that are written."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from regionspot.benchmarks.conditions import conditions
from regionspot.provenance import version_of
from tests.fuzz.child import MEMORY_BYTES
from tests.fuzz.parent import CASE_SECONDS, FAILURES, Failure, Report
from tests.fuzz.target import SEED

COLUMNS = ("accepted", "refused", *FAILURES)
MAX_CASES = 8
MAX_NOTE = 800


def print_report(reports: list[Report], seed: int = SEED) -> None:
    """Prints the outcomes of each kind, and under the table the failures, grouped by what looks
    like one fault.
    """
    rows: list[tuple[str, ...]] = [("kind", "cases", *COLUMNS, "seconds")]
    for report in reports:
        counts = [str(report.outcomes[column]) for column in COLUMNS]
        rows.append((report.kind, str(report.outcomes.total()), *counts, f"{report.seconds:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join((first.strip().ljust(widths[0]), *others)))
    seeded = "" if seed == SEED else f" --seed {seed}"
    for group in _groups([failure for report in reports for failure in report.failures]):
        example = group[0]
        numbers = ", ".join(str(failure.case) for failure in group[:MAX_CASES])
        more = f" and {len(group) - MAX_CASES} more" if len(group) > MAX_CASES else ""
        print(
            f"\n{example.outcome} in {example.kind} {example.where}: {len(group)} cases: "
            f"{numbers}{more}"
        )
        print(f"  {ascii(example.detail) if example.outcome != 'crash' else example.detail}")
        print(f"  input: {ascii(example.note)[:MAX_NOTE]}")
        print(f"  again: python -m tests.fuzz --kind {example.kind} --case {example.case}{seeded}")


def write_json(path: str, reports: list[Report], seed: int) -> None:
    """Writes the counts, the failures, and what they depend on: seed, limits, versions, machine."""
    more = {name: version_of(name) for name in ("numpy", "pillow", "safetensors")}
    content: dict[str, Any] = {
        "command": "make fuzz",
        "conditions": conditions(
            **more, seed=seed, case_seconds_limit=CASE_SECONDS, case_bytes_limit=MEMORY_BYTES
        ),
        "kinds": [
            {
                "kind": report.kind,
                "cases": report.outcomes.total(),
                **{column.replace(" ", "_"): report.outcomes[column] for column in COLUMNS},
                "seconds": round(report.seconds, 1),
                "failures": [
                    {"case": f.case, "outcome": f.outcome, "detail": f.detail}
                    for f in report.failures
                ],
            }
            for report in reports
        ],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _groups(failures: list[Failure]) -> list[list[Failure]]:
    groups = defaultdict(list)
    for failure in failures:
        groups[(failure.kind, *failure.group)].append(failure)
    return sorted(groups.values(), key=lambda group: (group[0].kind, -len(group)))
