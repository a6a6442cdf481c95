"""What callers pass in, as NumPy arrays and plain numbers: converted without loss, or refused in
one line.

Tensors of PyTorch are read without importing it, whatever their device, their type and their
gradients.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.errors import InputError, shown

_NOT_NUMBERS = {
    "U": "text",
    "S": "bytes",
    "c": "complex numbers",
    "M": "dates",
    "m": "durations",
    "V": "records",
}
_LARGEST_COUNT = 2**62


def as_array(values: Any, what: str) -> npt.NDArray[Any]:
    """Anything array-like as an array of any dtype; `what` names it in errors.

    Raises:
        InputError: rows of different lengths, no array at all, or masked elements.
    """
    if hasattr(values, "__next__"):
        raise InputError(
            f"{what} must be an array or nested lists, not a {type(values).__name__}: make a list "
            "of it"
        )
    if values is None or isinstance(values, (Mapping, Set)):
        raise InputError(f"{what} must be an array or nested lists, not a {type(values).__name__}")
    try:
        array = np.asanyarray(_without_tensors(values))
    except MemoryError:
        raise
    except Exception as error:  # conversions of other libraries raise anything
        raise InputError(f"{what} must be a rectangular array of numbers: {error}") from error
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise InputError(
            f"{what} must not have masked elements: fill them, or leave their rows out"
        )
    return np.asarray(array)


def as_numbers(values: Any, what: str, booleans: bool = False) -> npt.NDArray[np.float32]:
    """Anything array-like that holds real numbers, as float32; `what` names it in errors.

    Numbers too large for float32 become infinite.

    Args:
        booleans: take True and False for 1 and 0.

    Raises:
        InputError: as `as_array`, or the elements are not real numbers: text, None, complex,
            Boolean.
    """
    array = as_array(values, what)
    if array.dtype == np.float32:
        return array
    if wrong := _not_numbers(array, booleans):
        raise InputError(f"{what} must be a rectangular array of numbers, not of {wrong}")
    try:
        with np.errstate(over="ignore"):
            return array.astype(np.float64).astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{what} must be a rectangular array of numbers: {error}") from error


def as_whole_numbers(values: Any, what: str, booleans: bool = False) -> npt.NDArray[np.int32]:
    """Anything array-like that holds whole numbers, in whatever type, as int32.

    Raises:
        InputError: as `as_numbers`, or a number that is not whole or has more than 24 bits.
    """
    numbers = as_numbers(values, what, booleans)
    wrong = ~(np.abs(numbers) <= 2**24) | (numbers != np.round(numbers))  # NaN is wrong, too
    if wrong.any():
        raise InputError(f"{what} must be whole numbers, got {float(numbers[wrong][0]):.9g}")
    return numbers.astype(np.int32)


def checked_count(value: Any, name: str, least: int = 1) -> int:
    """A whole number of at least `least` as an `int`; NumPy's integers and floats without a
    fraction are taken.

    Raises:
        InputError: anything else; the message names the argument.
    """
    number = whole_number(value)
    if number is None or not least <= number <= _LARGEST_COUNT:
        raise InputError(f"{name} must be a whole number, {least} or more, got {shown(value)}")
    return number


def whole_number(value: Any) -> int | None:
    """The `int` that a value stands for; None where it is no whole number. Booleans and text are
    none.
    """
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (float, np.floating)):
        return int(value) if math.isfinite(value) and value == int(value) else None
    try:
        return operator.index(value)
    except Exception:  # tensors raise several
        return None


def _without_tensors(values: Any) -> Any:
    """Tensors become arrays, also within lists."""
    if isinstance(values, (list, tuple)):
        return [_without_tensors(value) for value in values] if _holds_tensors(values) else values
    if not callable(getattr(values, "detach", None)):
        return values
    tensor = values.detach().cpu()
    # 16-bit floats: NumPy lacks some
    if not tensor.is_floating_point() or tensor.element_size() >= 4:
        return tensor.resolve_neg().numpy()
    return tensor.float().numpy()


def _holds_tensors(values: Any) -> bool:
    if isinstance(values, (list, tuple)):
        return any(_holds_tensors(value) for value in values)
    return callable(getattr(values, "detach", None))


def _not_numbers(array: npt.NDArray[Any], booleans: bool) -> str | None:
    """What the elements are instead of real numbers, with the first that is none of them."""
    if array.dtype.kind == "O":
        wrong = (item for item in array.flat if not _is_real(item, booleans))
        return next((f"{type(item).__name__} ({shown(item)})" for item in wrong), None)
    kind = (
        "booleans"
        if array.dtype.kind == "b" and not booleans
        else _NOT_NUMBERS.get(array.dtype.kind)
    )
    return f"{kind} ({shown(array.flat[0].item())})" if kind and array.size else kind


def _is_real(value: Any, booleans: bool) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return booleans
    if isinstance(value, (str, bytes, bytearray, complex)):
        return False
    return hasattr(value, "__float__")
