"""The exceptions a user meets. Each message says what is wrong, why, and how to mend it."""

from __future__ import annotations

import traceback
import unicodedata
from collections.abc import Iterable
from os import PathLike, fspath
from types import FrameType
from typing import Any


class RegionSpotError(Exception):
    """Base of every error that regionspot raises on purpose."""


class InputError(RegionSpotError, ValueError):
    """Something the user passed in cannot be used: an image, a region, a word, a configuration."""


class ArtifactError(RegionSpotError):
    """A file is damaged, foreign or missing: a checkpoint, a cache shard, an artefact."""


def is_interrupt(error: BaseException) -> bool:
    """Whether a signal handler raised an exception, whatever its type, in the middle of somebody
    else's call.
    """
    return any(_is_handler(frame) for frame, _ in traceback.walk_tb(error.__traceback__))


def _is_handler(frame: FrameType) -> bool:
    """Whether a function was called as a signal handler: it is given the frame that it interrupts,
    its own caller.
    """
    given = list(frame.f_locals.values())
    given += [value for values in given if isinstance(values, tuple) for value in values]
    return frame.f_back is not None and any(value is frame.f_back for value in given)


def shown(value: Any, longest: int = 60) -> str:
    """A value for a message: its `repr`, cut in the middle where that is long."""
    try:
        text = repr(value)
    except Exception:  # for example of a whole number of thousands of digits
        text = f"a {type(value).__name__}"
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


MAX_NAMED = 5  # things listed in a message; the others are counted


def first_few(values: Iterable[object], most: int = MAX_NAMED) -> str:
    """The first few of `values` in words, and how many more there are."""
    named = [str(value) for value in values]
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return ", ".join(named[:most]) + more


def plain_text(text: str | PathLike[str]) -> str:
    r"""Text, or a file's name, that UTF-8 can hold: bytes of a name that are no UTF-8 are written
    as `\xe9`.

    >>> plain_text("caf\udce9.jpg")
    'caf\\xe9.jpg'
    """
    text = fspath(text)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        escaped = "".join(
            ch if not 0xDC80 <= ord(ch) <= 0xDCFF else f"\\x{ord(ch) - 0xDC00:02x}" for ch in text
        )
        return escaped.encode("utf-8", "backslashreplace").decode()


_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of what shows nothing of itself
_JOINERS = "\u200c\u200d"  # which emoji and words of some languages are written with


def visible(text: str) -> str:
    r"""A stranger's text as a part of one line: control characters, ends of lines, and marks that
    turn the direction of writing are escaped, so that a terminal shows them and does not obey.

    >>> visible("cat\x1b[2J\u202e\u2028dog")
    'cat\\x1b[2J\\u202e\\u2028dog'
    """
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _UNSEEN and letter not in _JOINERS
        else letter
        for letter in text
    )


def visible_lines(text: str) -> str:
    """As `visible`, of a text whose lines are meant."""
    return "\n".join(map(visible, text.split("\n")))
