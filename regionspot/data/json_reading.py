"""Reads JSON files that other programs wrote: any encoding with a mark, strict fields, one clear
line for each fault.

One rule holds for every field. A number may also be written as text (`"12"`, `" 1.5 "`), because
some exporters quote everything. A truth value is true, false, 1 or 0, or one of these as text; null
is false. Refused are NaN, infinities and what overflows (1e999), booleans in place of numbers, and
fractions in place of whole numbers. An id is a whole number of any size or a text, see `id_key`.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.errors import InputError

Id = int | str
FloatArray = npt.NDArray[np.float64]

# gzip, zip, bzip2, zstd, xz
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ")
EXACT_AS_FLOAT = 2**53
MAX_SHOWN = 200
_NUMBER = re.compile(r"[+-]?(\d{1,400}(\.\d{0,400})?|\.\d{1,400})([eE][+-]?\d{1,4})?", re.ASCII)
_WHOLE = re.compile(r"([+-]?\d{1,400})(\.0{1,400})?", re.ASCII)
_WRITTEN_ID = re.compile(r"\s*(0|-?[1-9]\d{0,400})(\.0{1,400})?\s*", re.ASCII)
_TRUTHS = {"false": False, "true": True}
_PLAIN_TYPES = frozenset({type(None), bool, int, float, str, list, tuple, dict})
_NAMES = {None: "null", True: "true", False: "false"}


class FieldError(ValueError):
    """A field that cannot be used. Its reader adds the file and the record."""


def read_json(path: Path, what: str, wanted: str) -> Any:
    """Reads a JSON file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Args:
        what: the file, as an error names it.
        wanted: what it should have been.

    Raises:
        InputError: it cannot be read, is not JSON, or repeats a key within one object.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {what} {printable(str(path))}: {reason}.") from error
    if not content.strip():
        raise InputError(f"{path} is empty. {wanted} is wanted.")
    if content.startswith(_COMPRESSED):
        raise InputError(f"{path} is compressed: unpack it first. {wanted} is wanted.")
    text = _decoded(path, content)
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be read. {wanted} is wanted.") from error
    except FieldError as error:
        raise InputError(f"{path}: {error}.") from error
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({_why_not_json(text, error)}). {wanted} is wanted."
        ) from error


def _decoded(path: Path, content: bytes) -> str:
    encoding = json.detect_encoding(content)
    try:
        # a lone surrogate is refused where a field holds it
        return content.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF8))
        kind = "damaged" if marked else "not UTF-8 text"
        raise InputError(
            f"{path} is {kind} (byte {content[error.start]:#04x} at position {error.start}): save "
            "it as UTF-8."
        ) from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Raises FieldError for a key that stands there
    twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise FieldError(
            f"an object has the key {shown(repeated)} twice, and only one of them can count"
        )
    return found


def _why_not_json(text: str, error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "a number in it has thousands of digits"
    if error.msg == "Extra data":
        return (
            f"{error}; several JSON values one after another, as in JSON Lines: put them into one "
            "list"
        )
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return f"{error}; it ends in the middle, as a file that was cut off does"
    return str(error)


def required(entry: Mapping[str, Any], key: str) -> Any:
    """The value of a key that a record must have."""
    if key not in entry:
        raise FieldError(f"has no key {key!r}")
    return entry[key]


def number(value: Any, key: str) -> float:
    """A finite number."""
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and abs(value) < EXACT_AS_FLOAT:
        return float(value)
    plain = _plain(value)
    if isinstance(plain, str) and _NUMBER.fullmatch(plain.strip()):
        plain = float(plain)
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise FieldError(f"{key}: must be a number, not {shown(value)}")
    try:
        found = float(plain)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise FieldError(f"{key}: must be a finite number, not {shown(value)}")
    return found


def integer(value: Any, key: str) -> int:
    """A whole number of any size."""
    if type(value) is int:
        return value
    plain = _plain(value)
    if isinstance(plain, str) and (match := _WHOLE.fullmatch(plain.strip())):
        plain = int(match[1])
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise FieldError(f"{key}: must be a whole number, not {shown(value)}")
    if isinstance(plain, float) and not plain.is_integer():
        raise FieldError(f"{key}: must be a whole number, not {shown(value)}")
    if isinstance(plain, float) and abs(plain) > EXACT_AS_FLOAT:
        raise FieldError(
            f"{key}: {shown(value)} has lost digits as a float; write the whole number itself"
        )
    return int(plain)


def truth(value: Any, key: str) -> bool:
    """True or False; null is False."""
    if value is None or (type(value) is int and value in (0, 1)):
        return bool(value)
    plain = _plain(value)
    if isinstance(plain, str):
        word = plain.strip().lower()
        plain = float(word) if _NUMBER.fullmatch(word) else _TRUTHS.get(word, plain)
    if plain is None or (isinstance(plain, bool | int | float) and plain in (0, 1)):
        return bool(plain)
    raise FieldError(f"{key}: must be true or false, 1 or 0, not {shown(value)}")


def text(value: Any, key: str) -> str:
    """A text with a visible character and without half a surrogate pair, which UTF-8 cannot
    hold.
    """
    if not isinstance(value, str) or not value.strip():
        raise FieldError(f"{key}: must be text, not {shown(value)}")
    if not is_encodable(value):
        raise FieldError(
            f"{key}: {shown(value)} holds half a surrogate pair: write the whole character"
        )
    return value


def identifier(value: Any, key: str) -> Id:
    """An id: a whole number of any size, or a text, which keeps its spelling."""
    if type(value) is int:
        return value
    return text(value, key) if isinstance(value, str) else integer(value, key)


def id_key(value: Id) -> Id:
    """What an id is compared by: "7" and "7.0" are 7, but "007", "7e1" and "abc" are texts of their
    own.
    """
    if isinstance(value, int):
        return value
    match = _WRITTEN_ID.fullmatch(value)
    return int(match[1]) if match else value


def id_order(value: Id) -> tuple[bool, Id]:
    """The sort key of ids: whole numbers by size, then texts."""
    key = id_key(value)
    return isinstance(key, str), key


def numbers(value: Any, key: str, count: int) -> list[float]:
    """A list of `count` finite numbers."""
    plain = value if type(value) is list else _plain(value)
    if not isinstance(plain, list | tuple):
        raise FieldError(f"{key}: must be a list of {count} numbers, not {shown(value)}")
    if len(plain) != count:
        raise FieldError(
            f"{key}: must be a list of {count} numbers, not of {len(plain)}: {shown(value)}"
        )
    return [number(one, key) for one in plain]


def number_column(values: Sequence[Any], key: str, record: Callable[[int], str]) -> FloatArray:
    """(M,) of M fields; `record` names one by its index in an error."""
    return number_rows([(value,) for value in values], key, 1, record, one=True)[:, 0]


def number_rows(
    rows: Sequence[Any], key: str, count: int, record: Callable[[int], str], one: bool = False
) -> FloatArray:
    """(M, count) of M lists of numbers; as `numbers`, and quick for millions of plain ones."""
    plain = _plain_rows(rows, count)
    if plain is not None:
        return plain
    found = np.empty((len(rows), count))
    for index, row in enumerate(rows):
        try:
            found[index] = number(row[0], key) if one else numbers(row, key, count)
        except FieldError as error:
            raise FieldError(f"{record(index)}: {error}") from error
    return found


def _plain_rows(rows: Sequence[Any], count: int) -> FloatArray | None:
    """(M, count) where every row holds `count` plain finite numbers, otherwise None."""
    if not set(map(type, rows)) <= {list, tuple} or not set(map(len, rows)) <= {count}:
        return None
    flat = list(chain.from_iterable(rows))
    if not set(map(type, flat)) <= {int, float}:
        return None
    try:
        found = np.array(flat, np.float64).reshape(-1, count)
    except OverflowError:
        return None
    return found if np.isfinite(found).all() else None


def id_array(ids: Iterable[Id]) -> npt.NDArray[Any]:
    """(M,) int64 where every id is a number that fits, otherwise (M,) objects."""
    ids = list(ids)
    if set(map(type, ids)) <= {int}:
        try:
            return np.array(ids, np.int64)
        except OverflowError:
            pass
    found = np.empty(len(ids), object)
    found[:] = ids
    return found


def is_encodable(value: str) -> bool:
    """Whether UTF-8 can hold a text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value as an error shows it: short, on one line, and never an error itself."""
    if value is None or isinstance(value, bool):
        return _NAMES[value]
    try:
        return _SHORT.repr(value).encode("utf-8", "backslashreplace").decode()
    except Exception:  # a foreign object's own repr, or an int with more digits than Python prints
        return f"a value of type {type(value).__name__}"


def printable(name: str) -> str:
    """A file name as a message shows it: with escapes where it cannot be printed, cut where it is
    very long.
    """
    shows = name if name.isprintable() else ascii(name)[1:-1]
    return (
        shows
        if len(shows) <= MAX_SHOWN
        else f"{shows[: MAX_SHOWN // 2]}...{shows[-MAX_SHOWN // 2 :]}"
    )


def _plain(value: Any) -> Any:
    """A scalar or an array of NumPy or PyTorch as Python's own value; anything else as it is."""
    if type(value) in _PLAIN_TYPES:
        return value
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "detach"):
        return value.tolist()
    return value


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlong = 40
_SHORT.maxlevel = 2
