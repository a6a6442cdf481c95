"""What a JSON value means, read as plainly as can be: the measure for what the project's readers
say.
"""

from __future__ import annotations

import contextlib
import math
import re
from fractions import Fraction
from typing import Any

from tests.fuzz.target import check, fail


def exact_number(value: Any) -> Fraction:
    """A finite number, also from text such as "7" or "1.5".

    Raises:
        WrongAnswer: the value is none, and yet the project took it for one.
    """
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError, ZeroDivisionError):
            return Fraction(value)
    fail(f"{value!r:.80} was taken for a number")


def id_meaning(value: Any) -> int | str:
    """The number that an id is, also one written as text as numbers are written; otherwise the
    text.
    """
    if isinstance(value, str) and not re.fullmatch(r"\s*(0|-?[1-9][0-9]*)(\.0+)?\s*", value):
        return value
    number = exact_number(value)
    check(number.denominator == 1, f"the id {value!r:.80} was accepted")
    return int(number)


def check_id(read: Any, value: Any, what: str) -> None:
    """A number is read exactly, a text keeps its spelling."""
    check(type(read) in (int, str), f"{what} is read as the {type(read).__name__} {read!r}")
    check(
        read == (value if isinstance(value, str) else id_meaning(value)),
        f"{what} {value!r:.80} is read as {read!r}",
    )


def check_integer(read: Any, value: Any, what: str) -> None:
    check(type(read) is int, f"{what} is read as the {type(read).__name__} {read!r}")
    check(read == exact_number(value), f"{what} {value!r:.80} is read as {read}")


def check_float(read: float, value: Any, what: str) -> None:
    check(type(read) is float and math.isfinite(read), f"{what} is read as {read!r}")
    meant = exact_number(value)
    check(
        abs(Fraction(read) - meant) <= abs(meant) * Fraction(1, 2**52),
        f"{what} {value!r:.80} is read as {read}",
    )


def check_flag(read: Any, value: Any, what: str) -> None:
    """A yes or no: true, false, 0, 1, the same as text, or nothing at all."""
    check(type(read) is bool, f"{what} is read as {read!r}")
    text = str(value).strip().lower()
    meant = {
        "none": False,
        "false": False,
        "0": False,
        "0.0": False,
        "true": True,
        "1": True,
        "1.0": True,
    }.get(text)
    check(meant is not None, f"{what} {value!r:.80} was taken for {read}")
    check(meant == read, f"{what} {value!r:.80} is read as {read}")


def check_text(read: Any, value: Any, what: str) -> None:
    check(type(value) is str, f"{what} {value!r:.80} was taken for a text")
    check(read == value, f"{what} {value!r:.80} is read as {read!r:.80}")
