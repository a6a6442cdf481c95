"""Conditions that a report must not fulfil, for continuous integration: "dAP>0.1"."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from regionspot.benchmarks.kinds import reports_in, title_of
from regionspot.errors import InputError

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_EXPRESSION = re.compile(
    rf"\s*(\w+)\s*({'|'.join(COMPARISONS)})\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*"
)


def check(expression: str, report: Mapping[str, Any]) -> list[str]:
    """What is wrong: a line for each row for which the expression holds, or cannot be judged.

    A row of the same benchmark that was not measured counts as one that cannot be judged.

    Raises:
        InputError: not of the form "figure operator number", or no row has such a figure.
    """
    figure, compare, limit = _parse(expression)
    found, failures = False, []
    for one in reports_in(report):
        rows = [row for row in one["rows"] if figure in row]
        if not rows:
            continue
        found = True
        missing = [row for row in one["rows"] if figure not in row and row.get("note")]
        for row in rows + missing:
            value = row.get(figure)
            if not isinstance(value, int | float):
                failures.append(
                    f"{expression} cannot be judged of {title_of(one, row)}: "
                    f"{row.get('note') or value}"
                )
            elif compare(value, limit):
                failures.append(
                    f"{expression} holds of {title_of(one, row)}: {figure} is {value:g}"
                )
    if not found:
        raise InputError(
            f"--fail-if {expression!r}: no row has {figure!r}; there are "
            f"{', '.join(_figures(report))}"
        )
    return failures


def _parse(expression: str) -> tuple[str, Callable[[float, float], bool], float]:
    parsed = _EXPRESSION.fullmatch(expression)
    try:
        if parsed is not None:
            return parsed[1], COMPARISONS[parsed[2]], float(parsed[3])
    except ValueError:  # such as 1.2.3
        pass
    raise InputError(
        f"--fail-if {expression!r} is not a figure, an operator and a number, such as 'dAP>0.1'"
    )


def _figures(report: Mapping[str, Any]) -> Iterator[str]:
    """Names of all numbers in the rows, each once."""
    names = (
        name
        for one in reports_in(report)
        for row in one["rows"]
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    yield from dict.fromkeys(names)
