"""Lists of positive numbers, as options of benchmarks give them."""

from __future__ import annotations

from regionspot.errors import InputError


def counts(option: str, text: str) -> list[int]:
    """Returns the different numbers of a text such as "1,10,100" in increasing order.

    Raises:
        InputError: for anything but positive numbers; names the option.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise InputError(f"{option} {text!r} is not a list of positive numbers such as 1,10,100")
    return numbers
