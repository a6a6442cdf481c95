"""Vocabularies as files: named lists of words that a gateway keeps."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regionspot.errors import ArtifactError, InputError
from regionspot.files import write_atomically
from regionspot.serving.contract import RequestError, ServingError, coded, version_of
from regionspot.structures import as_class_names
from regionspot.vocabulary_files import names_in_file

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
OWN_SUFFIX = ".json"
"""Of the files that are written here; files of other kinds are read alone."""

MAX_VOCABULARIES = 1000


@dataclass(frozen=True)
class NamedWords:
    """A vocabulary.

    Args:
        version: changes with the words and their order.
        stamp: of its file, to see when that changes.
    """

    name: str
    words: tuple[str, ...]
    version: str
    stamp: tuple[int, ...] = ()


class VocabularyFolder:
    """Vocabularies as files of a folder: NAME.json for those that callers put, and any that
    `regionspot.vocabulary_files.names_in_file` reads. Safe for several threads at once.

    Args:
        folder: None keeps them in memory alone.

    Raises:
        InputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._found: dict[str, NamedWords] = {}
        self._damaged: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                list(folder.iterdir())
            except OSError as error:
                raise InputError(
                    f"the folder of vocabularies {folder} cannot be used ({error.strerror}): name "
                    "another with --vocabularies"
                ) from error
            self.refresh()

    def all(self) -> Mapping[str, NamedWords]:
        """By name, sorted."""
        return dict(sorted(self._found.items()))

    def get(self, name: str) -> NamedWords | None:
        return self._found.get(name)

    def put(self, name: str, words: Sequence[str]) -> NamedWords:
        """Keeps a vocabulary, in place of one of the same name.

        Raises:
            RequestError: a name or words that cannot be used.
            ServingError: INTERNAL, the folder cannot be written.
        """
        check_name(name)
        with coded("VOCABULARY_INVALID"):
            names = as_class_names(words)
        with self._lock:
            return self._put(name, names)

    def _put(self, name: str, names: tuple[str, ...]) -> NamedWords:
        if name not in self._found and len(self._found) >= MAX_VOCABULARIES:
            raise RequestError(
                "VOCABULARY_INVALID",
                f"there are {len(self._found)} vocabularies, which is the most: delete one",
            )
        path = self._own_path(name)
        if path is not None:
            content = json.dumps(list(names), ensure_ascii=False, indent=0).encode()
            try:
                write_atomically(path, content)
            except ArtifactError as error:
                raise ServingError("INTERNAL", str(error)) from error
        found = NamedWords(name, names, version_of(names), () if path is None else _stamp(path))
        self._found[name] = found
        return found

    def delete(self, name: str) -> bool:
        """Forgets a vocabulary. Returns whether there was one.

        Raises:
            RequestError: its file was not put by a caller.
            ServingError: INTERNAL, the file cannot be removed.
        """
        with self._lock:
            if name not in self._found:
                return False
            path = self._own_path(name)
            if path is not None:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise ServingError("INTERNAL", f"{path} cannot be removed: {error}") from error
            del self._found[name]
        return True

    def refresh(self) -> list[NamedWords]:
        """Reads files that are new or have changed, and forgets those that are gone. A file that
        cannot be used is logged once, and leaves the words that it had.

        Returns:
            The vocabularies that are new or have changed.
        """
        if self._folder is None:
            return []
        with self._lock:
            return self._refresh()

    def _refresh(self) -> list[NamedWords]:
        changed = []
        present = self._files()
        for name, path in present.items():
            stamp, known = _stamp(path), self._found.get(name)
            if stamp in (known.stamp if known else None, self._damaged.get(name)):
                continue
            try:
                check_name(name)
                words = names_in_file(path)
            except InputError as error:
                self._damaged[name] = stamp
                logger.warning(f"the vocabulary {name} is not read: {error}")
                continue
            self._damaged.pop(name, None)
            self._found[name] = NamedWords(name, words, version_of(words), stamp)
            if known is None or known.words != words:
                changed.append(self._found[name])
        for name in set(self._found) - set(present):
            del self._found[name]
        return changed

    def _files(self) -> dict[str, Path]:
        """By vocabulary; of several files of one name the one that a caller put."""
        assert self._folder is not None
        try:
            paths = sorted(self._folder.iterdir(), key=lambda path: path.suffix == OWN_SUFFIX)
        except OSError as error:
            logger.warning(f"the folder of vocabularies cannot be read: {error}")
            return {one.name: self._folder / one.name for one in self._found.values()}
        return {
            path.stem: path for path in paths if not path.name.startswith(".") and path.is_file()
        }

    def _own_path(self, name: str) -> Path | None:
        """Where a vocabulary that callers put is kept; None where none is on disk.

        Raises:
            RequestError: there is a file of that name which no caller put.
        """
        if self._folder is None:
            return None
        path = self._files().get(name)
        if path is not None and path.suffix != OWN_SUFFIX:
            raise RequestError(
                "VOCABULARY_INVALID",
                f"the vocabulary {name} is a file of the operator's, {path.name}: choose another "
                "name, or have the file changed",
            )
        return self._folder / f"{name}{OWN_SUFFIX}"


def check_name(name: str) -> None:
    """Raises RequestError for a name that no vocabulary may have."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            "VOCABULARY_INVALID",
            "a vocabulary's name is up to 64 letters, digits, _, - and dots, and begins with a "
            "letter or a digit",
        )


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino
