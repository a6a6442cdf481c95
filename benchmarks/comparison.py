"""Two reports, figure by figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regionspot.benchmarks.kinds import COLLECTION, KINDS, cell, reports_in
from regionspot.errors import InputError

SAME_MACHINE = ("processor", "cpus", "threads")
"""What must be equal for times to compare."""


def load_report(path: Path) -> dict[str, Any]:
    """A report that `--json` wrote.

    Raises:
        InputError: no such file, not JSON, not a report.
    """
    try:
        report = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): name a file that --json wrote"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): name a file that --json wrote") from error
    try:
        for one in reports_in(report):
            if not isinstance(one["rows"], list):
                raise InputError("its rows are no list")
    except (InputError, KeyError) as error:
        raise InputError(
            f"{path}: {error}. Name a file that regionspot-benchmark wrote with --json."
        ) from error
    found: dict[str, Any] = report
    return found


def collect(paths: list[Path]) -> dict[str, Any]:
    """Several reports as one. Raises InputError as `load_report`, and if two are of the same
    kind.
    """
    reports = [one for path in paths for one in reports_in(load_report(path))]
    kinds = [one["benchmark"] for one in reports]
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise InputError(f"there are two reports of {', '.join(twice)}: give one of each kind")
    return {"benchmark": COLLECTION, "reports": reports}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A report with a row for each figure that both have; one more for each row that only one of
    them has.

    A row has `old`, `new` and `ratio`, and besides, for `--fail-if`, the distance and the ratio
    under the figure's own name: `dAP` and `AP_ratio`.

    Raises:
        InputError: they have no kind of benchmark in common.
    """
    of_old, of_new = (
        {one["benchmark"]: one for one in reports_in(report)} for report in (old, new)
    )
    kinds = [kind for kind in of_old if kind in of_new]
    if not kinds:
        raise InputError(
            f"there is nothing to compare: one report is of {', '.join(of_old)}, the other of "
            f"{', '.join(of_new)}"
        )
    rows = [row for kind in kinds for row in _rows(kind, of_old[kind], of_new[kind])]
    conditions = {
        name: {kind: of[kind].get("conditions", {}).get("commit") for kind in kinds}
        for name, of in (("old", of_old), ("new", of_new))
    }
    differing = sorted({name for kind in kinds for name in _differing(of_old[kind], of_new[kind])})
    note = (
        f"times do not compare: {', '.join(differing)} differ"
        if differing
        else "measured on machines of one kind"
    )
    return {"benchmark": "compare", "rows": rows, "conditions": {**conditions, "machines": note}}


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in SAME_MACHINE:
        if old.get("conditions", {}).get(name) != new.get("conditions", {}).get(name):
            yield name


def _rows(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    before, after = ({_identity(kind, row): row for row in report["rows"]} for report in (old, new))
    for identity in dict.fromkeys([*before, *after]):
        named = {"kind": kind, "row": " ".join(filter(None, identity))}
        if identity not in before or identity not in after:
            yield named | {
                "note": "only in the new one" if identity in after else "only in the old one"
            }
            continue
        for figure in KINDS[kind].compared:
            was, is_now = before[identity].get(figure), after[identity].get(figure)
            if was is not None or is_now is not None:
                yield named | _compared(figure, was, is_now)


def _compared(figure: str, was: float | None, is_now: float | None) -> dict[str, Any]:
    if was is None or is_now is None:
        return {"figure": figure, "old": was, "new": is_now, "note": "one of them was not measured"}
    ratio = is_now / was if was else None
    named = {f"d{figure}": abs(is_now - was), f"{figure}_ratio": ratio}
    return {"figure": figure, "old": was, "new": is_now, "ratio": ratio, **named}


def _identity(kind: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(cell(row, column) for column in KINDS[kind].identity)
