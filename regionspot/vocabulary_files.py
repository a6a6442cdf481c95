"""Class names from files: plain text, CSV, COCO and LVIS annotations, JSON lists, and YOLO's
data.yaml.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from regionspot.arrays import whole_number
from regionspot.errors import InputError, shown
from regionspot.structures import as_class_names

MAX_BYTES = 64 << 20
"""What is read of a device or a pipe, which may never end."""

READABLE = (
    "a text file with a name on each line (in UTF-8), a CSV file of one column, a COCO or LVIS "
    ".json, a JSON list of names, or a YOLO data.yaml with `names`"
)
_HEADERS = ("name", "names", "class", "class_name", "category", "label")
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def names_in_file(path: str | Path) -> tuple[str, ...]:
    """The class names that a file lists, checked.

    The name's ending tells the format; without a known one, the first character: `{` or `[` begins
    JSON.

    Raises:
        InputError: the file is missing, in another format or encoding, or its names cannot be used
            (see `as_class_names`); the message names the file.
    """
    path = Path(path)
    text = _read_text(path)
    reader = _READERS.get(path.suffix.lower(), _lines_or_json)
    try:
        names, ids = reader(text)
        return as_class_names(names, ids)
    except InputError as error:
        raise InputError(f"vocabulary file {path}: {error}") from error


def is_vocabulary_file(spec: str) -> bool:
    """Whether a text names a file: one that is there, or by its ending."""
    if spec.lower().endswith(tuple(_READERS)) or spec.startswith(("/", "./", "../", "~/")):
        return True
    try:
        mode = os.stat(spec).st_mode
    except (OSError, ValueError):  # too long for a path, a null character
        return False
    return not stat.S_ISDIR(mode)


Names = tuple[list[str], list[object] | None]
"""Names, and the ids that the file has for them."""


def text_lines(text: str) -> list[str]:
    """The lines that are not blank, without the space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _lines(text: str) -> Names:
    names = text_lines(text)
    if len(names) == 1 and "," in names[0]:
        raise InputError(
            f"it is one line with commas ({shown(names[0])}): put each name on its own line"
        )
    return names, None


def _lines_or_json(text: str) -> Names:
    return _json(text) if text.lstrip()[:1] in ("{", "[") else _lines(text)


def _csv(text: str) -> Names:
    lines = [line for line in text.splitlines() if line.strip()]
    delimiter = next((one for one in ";\t" if lines and all(one in line for line in lines)), ",")
    try:
        rows = [
            [cell.strip() for cell in row if cell.strip()]
            for row in csv.reader(lines, delimiter=delimiter)
        ]
    except csv.Error as error:
        raise InputError(f"it is not CSV ({error}); what is read is {READABLE}") from error
    rows = [row for row in rows if row]
    wide = next((row for row in rows if len(row) > 1), None)
    if wide:
        raise InputError(
            f"it has several columns ({shown(wide)}): leave the names alone, one on each line"
        )
    if rows and rows[0][0].lower() in _HEADERS:
        rows = rows[1:]
    return [row[0] for row in rows], None


def _json(text: str) -> Names:
    # here, because it belongs to a higher layer
    from regionspot.data.json_reading import (
        FieldError,
        unique_keys,
    )

    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
    except FieldError as error:
        raise InputError(f"{error}: give each its own") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not JSON ({error}); what is read is {READABLE}") from error
    if isinstance(content, Mapping) and "categories" in content:
        return _categories(content["categories"])
    return _names(content)


def _yaml(text: str) -> Names:
    from regionspot.config import load_yaml  # here, because Triton's Python does without PyYAML

    try:
        content = load_yaml(text)
    except MemoryError:
        raise
    except Exception as error:  # PyYAML lets many through: of dates, of keys that are lists
        reason = " ".join(str(error).split())
        raise InputError(f"it is not YAML ({reason}); what is read is {READABLE}") from error
    return _names(content)


def _names(content: Any) -> Names:
    """A list of names, or what stands under `names`: a list, or YOLO's dictionary from class index
    to name.
    """
    names = content.get("names") if isinstance(content, Mapping) else content
    if isinstance(names, list):
        return _texts(names, [f"names[{index}]" for index in range(len(names))]), None
    if isinstance(names, Mapping) and names:
        names = dict(sorted(names.items(), key=_sort_key(list(names), "the keys of `names`")))
        return _texts(list(names.values()), [f"names[{key!r}]" for key in names]), list(names)
    raise InputError(f"it lists no class names; what is read is {READABLE}")


def _categories(categories: Any) -> Names:
    """COCO's and LVIS's categories, in the order of their ids."""
    if not isinstance(categories, list):
        raise InputError(
            f"its `categories` are {shown(categories)}, not a list of objects with id and name"
        )
    for index, category in enumerate(categories):
        if not isinstance(category, Mapping) or not {"id", "name"} <= category.keys():
            raise InputError(
                f"categories[{index}] is {shown(category)}, not an object with id and name"
            )
    key = _sort_key([category["id"] for category in categories], "the ids of `categories`")
    ordered = sorted(categories, key=lambda category: key((category["id"], None)))
    ids = [category["id"] for category in ordered]
    places = [f"the name of category {shown(category_id)}" for category_id in ids]
    return _texts([category["name"] for category in ordered], places), ids


def _sort_key(ids: list[Any], what: str) -> Callable[[tuple[Any, Any]], Any]:
    """Orders (id, anything) by whole numbers, also those written as text, or where ids are all
    other text, by that.
    """
    if all(_as_number(value) is not None for value in ids):
        convert: Callable[[Any], Any] = _as_number
    elif all(isinstance(value, str) for value in ids):
        convert = str
    else:
        wrong = next(
            value for value in ids if not isinstance(value, str) or _as_number(value) is None
        )
        raise InputError(f"{what} must all be whole numbers or all be text, got {shown(wrong)}")
    seen: dict[Any, Any] = {}
    for value in ids:
        if convert(value) in seen:
            raise InputError(f"{what} hold {shown(value)} twice: each class needs an id of its own")
        seen[convert(value)] = value
    return lambda item: convert(item[0])


def _as_number(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"0|[1-9][0-9]{0,99}", value) else None
    return whole_number(value)


def _texts(names: list[Any], places: list[str]) -> list[str]:
    for name, place in zip(names, places, strict=True):
        if not isinstance(name, str):
            raise InputError(
                f"{place} is {shown(name)}, not text: write each name as text, in quotes"
            )
    return [name.strip() for name in names]


def _read_text(path: Path) -> str:
    def refuse(reason: str, cause: Exception | None = None) -> NoReturn:
        raise InputError(f"vocabulary file {path} cannot be read: {reason}") from cause

    try:
        with open(path, "rb") as file:
            endless = not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_BYTES + 1 if endless else -1)
    except (OSError, ValueError) as error:  # ValueError: a null character
        refuse(getattr(error, "strerror", None) or str(error), error)
    if endless and len(content) > MAX_BYTES:
        refuse(f"it is no file, and does not end within {MAX_BYTES >> 20} MiB")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        refuse(
            f"it is not text in {encoding.upper()} ({error}); save it as UTF-8. What is read is "
            f"{READABLE}",
            error,
        )
    if "\0" in text:
        refuse(
            "it holds null characters, so it is no text, or in another encoding; save it as UTF-8"
        )
    return text


_READERS: dict[str, Callable[[str], Names]] = {
    ".txt": _lines,
    ".names": _lines_or_json,
    ".csv": _csv,
    ".json": _json,
    ".yaml": _yaml,
    ".yml": _yaml,
}
