"""Fonts that have the letters of a text: a given one, Pillow's own, or one that the system has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

from PIL import ImageFont, features

from regionspot.errors import InputError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PROBE_SIZE = 24
_NOT_CHARACTERS = ("\uffff", "\U0010ffff")  # no font has a glyph of its own for them
_DRAWN_AS_NOTHING = {0x200C, 0x200D, *range(0xFE00, 0xFE10)}  # joiners and variation selectors
_SHAPED = ((0x0900, 0x0DFF), (0x0E80, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1B00, 0x1BFF))
"""Scripts of South and South-East Asia, whose letters move and merge."""

_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_LIST_TIMEOUT_S = 20


@dataclass(frozen=True)
class FontFile:
    """A font in a file that may hold several; no path stands for Pillow's own font."""

    path: str | None = None
    index: int = 0


def read_font(path: str | os.PathLike[str]) -> FontFile:
    """A font that a user names.

    Raises:
        InputError: the file is missing or no font of outlines.
    """
    try:
        font = FontFile(os.fspath(path))
        _load(font, _PROBE_SIZE)
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"font {str(path)!r} cannot be used ({error}): give a .ttf, .otf or .ttc file"
        ) from error
    return font


def font_for(text: str, size: int, given: FontFile | None = None) -> Font | None:
    """A font with a glyph for every letter of the text, which it can also set; None where there is
    none.

    `given` is asked first, then Pillow's own font, then those of the system.
    """
    found = _file_for("".join(sorted(set(text))), given)
    return None if found is None else _load(found, size)


def default_font(size: int) -> Font:
    """Pillow's own font, which has the letters of Western European languages."""
    return _load(FontFile(), size)


@lru_cache(maxsize=4096)
def _file_for(letters: str, given: FontFile | None) -> FontFile | None:
    if not features.check("raqm") and any(map(_needs_shaping, letters)):
        return None
    first = [FontFile()] if given is None else [given, FontFile()]
    fonts = chain(first, _system_fonts(letters))  # a generator: the system is asked last
    return next((font for font in fonts if _has_all(font, letters)), None)


def _needs_shaping(letter: str) -> bool:
    code = ord(letter)
    return unicodedata.bidirectional(letter) in ("R", "AL") or any(
        low <= code <= high for low, high in _SHAPED
    )


def _has_all(font: FontFile, letters: str) -> bool:
    try:
        return all(_has(font, letter) for letter in letters)
    except (OSError, ValueError):  # a damaged font, one of coloured pictures, one of other sizes
        return False


@lru_cache(maxsize=65536)
def _has(font: FontFile, letter: str) -> bool:
    """Whether a letter is drawn as anything but what stands for missing letters."""
    if letter.isspace() or ord(letter) in _DRAWN_AS_NOTHING:
        return True
    drawn = _drawn(font, letter)
    return any(drawn[1]) and all(drawn != _drawn(font, missing) for missing in _NOT_CHARACTERS)


def _drawn(font: FontFile, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = _load(font, _PROBE_SIZE).getmask(letter, mode="L")
    return mask.size, bytes(mask)


@lru_cache(maxsize=64)
def _load(font: FontFile, size: int) -> Font:
    if font.path is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(font.path, size, index=font.index)


def _system_fonts(letters: str) -> Iterator[FontFile]:
    """The system's fonts, those that a label should have first; fontconfig leaves out what lacks a
    letter.
    """
    listed = _listed_by_fontconfig(letters)
    yield from sorted(_in_folders() if listed is None else listed, key=_preference)


def _preference(font: FontFile) -> tuple[bool, bool, bool, str, int]:
    """Sans-serif fonts of normal weight and width come first, in an order that stays."""
    name = os.path.basename(font.path or "").lower()
    special = (
        "serif" in name.replace("sansserif", "") or re.search(r"mono|math|symbol", name) is not None
    )
    styled = re.search(r"bold|black|heavy|thin|light|italic|oblique|condensed", name) is not None
    return special, styled, "sans" not in name, name, font.index


def _listed_by_fontconfig(letters: str) -> list[FontFile] | None:
    """The fonts that have the letters; None without fontconfig."""
    charset = " ".join(f"{ord(letter):x}" for letter in letters if not letter.isspace())
    command = ["fc-list", "--format", "%{file}\\t%{index}\\n", f":charset={charset}:scalable=true"]
    try:
        run = subprocess.run(command, capture_output=True, timeout=_LIST_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = (os.fsdecode(line).rpartition("\t") for line in run.stdout.splitlines())
    # above: its instances
    return list({FontFile(path, int(index) & 0xFFFF) for path, _, index in lines if path})


@lru_cache(maxsize=1)
def _in_folders() -> list[FontFile]:
    found = (
        path
        for folder in _folders()
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
    )
    return [FontFile(str(path)) for path in found]


def _folders() -> list[Path]:
    home = os.path.expanduser("~")
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), Path(home, "Library/Fonts")]
    if os.name == "nt":
        return [
            Path(os.environ.get("WINDIR", r"C:\Windows"), "Fonts"),
            Path(os.environ.get("LOCALAPPDATA", home), "Microsoft", "Windows", "Fonts"),
        ]
    return [
        Path("/usr/share/fonts"),
        Path("/usr/local/share/fonts"),
        Path(home, ".fonts"),
        Path(os.environ.get("XDG_DATA_HOME") or os.path.join(home, ".local", "share"), "fonts"),
    ]
