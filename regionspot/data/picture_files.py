"""Finds the pictures that annotation files name: by URL, by a path of Windows or of another
machine, or plainly.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PureWindowsPath
from urllib.parse import parse_qs, unquote, urlsplit

from regionspot.data.json_reading import FieldError, shown

LABEL_STUDIO = "/data/local-files/"
LOOKUPS_BEFORE_LISTING = 16


def checked_name(name: str) -> str:
    """A file name that the file system can be asked for.

    Bytes of a name that is not UTF-8 may stand in it as Python writes them (`"caf\\udce9.jpg"`).

    Raises:
        FieldError: it holds NUL or another half of a surrogate pair.
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise FieldError(
            f"file_name: {shown(name)} holds half a surrogate pair: no file has that name"
        ) from error
    if "\0" in name:
        raise FieldError(f"file_name: {shown(name)} holds a NUL character: no file has that name")
    return name


def foreign_parts(name: str) -> tuple[str, ...]:
    r"""The parts of a name that was not written for this machine: a URL's path, or an absolute
    path.

    `C:\pics\x.jpg`, `s3://bucket/pics/x.jpg?version=2` and `/home/someone/pics/x.jpg` all end in
    pics, x.jpg. A relative name has no foreign parts.
    """
    windows = PureWindowsPath(name)
    if "://" in name:
        parts = _url_parts(name)
    elif name.startswith(LABEL_STUDIO):
        parts = _url_parts(f"file:{name}")
    elif windows.drive:
        parts = list(windows.parts[1:] if windows.root else (windows.name,))
    elif name.startswith(("/", "\\")):
        parts = name.replace("\\", "/").split("/")
    else:
        parts = []
    return tuple(part for part in parts if part not in ("", ".", ".."))


def _url_parts(name: str) -> list[str]:
    try:
        url = urlsplit(name)
    except ValueError:  # as of "http://[x"
        return name.split("/")
    if url.path.startswith(LABEL_STUDIO):
        return parse_qs(url.query).get("d", [""])[0].replace("\\", "/").split("/")
    return unquote(url.path).split("/")


def last_part(name: str) -> str:
    """The file name alone, without folders."""
    parts = foreign_parts(name) or name.replace("\\", "/").split("/")
    return parts[-1]


class PictureFinder:
    r"""Finds pictures under a root, and asks the file system as little as possible.

    A folder in which many names are looked up is listed once. A relative name is taken literally,
    or with `/` for `\` where there is no such file; it may begin with the root's own last folders
    (`val/0.jpg` under `pics/val`). Of a name of another place (see `foreign_parts`) the longest
    ending that exists counts.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._asked: Counter[str] = Counter()
        self._listed: dict[str, frozenset[str]] = {}

    def find(self, name: str) -> Path | None:
        """Where a picture lies, or None."""
        literal = self.root / name
        if "://" not in name and self.is_file(literal):
            return literal
        foreign = foreign_parts(name)
        names = ["/".join(foreign[start:]) for start in range(len(foreign))]
        if "://" in name:  # saved under the name as it is written
            raw = name.partition("://")[2].split("/")[1:]
            names += ["/".join(raw[start:]) for start in range(len(raw))]
        if not foreign:
            plain = name.replace("\\", "/")
            names += [plain, *self._from_above(plain)]
        return next((self.root / one for one in names if self.is_file(self.root / one)), None)

    def _from_above(self, name: str) -> list[str]:
        """What is left of a relative name behind folders that the root itself ends in."""
        parts, root = name.split("/"), Path(os.path.abspath(self.root)).parts
        return [
            "/".join(parts[count:])
            for count in range(1, len(parts))
            if root[-count:] == tuple(parts[:count])
        ]

    def is_file(self, path: Path) -> bool:
        """Whether there is such a file, as far as listings and the file system say."""
        folder, name = os.path.split(path)
        if folder not in self._listed:
            self._asked[folder] += 1
            if self._asked[folder] > LOOKUPS_BEFORE_LISTING:
                self._listed[folder] = _files(folder)
        return name in self._listed.get(folder, ()) or os.path.isfile(path)


def _files(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()
