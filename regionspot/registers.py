"""Registers: rows by name, to which other packages add theirs by entry points."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar

from regionspot.errors import InputError, is_interrupt


class Named(Protocol):
    """A row of a register."""

    @property
    def name(self) -> str: ...


RowT = TypeVar("RowT", bound=Named)


class Plugins:
    """The rows that other packages announce by entry points of one group.

    They are loaded when a register is first read, not when its module is imported: a plug-in
    imports that module itself.

    Args:
        group: of the entry points; each names a sequence of rows.
        register: is called with the rows of each entry point.
    """

    def __init__(self, group: str, register: Callable[..., None]) -> None:
        self._group, self._register = group, register
        self._lock = threading.RLock()
        self._loading = False
        self._pending: list[EntryPoint] | None = None

    def load(self) -> None:
        """Adds the rows, once. A plug-in that fails is a warning: it must not take regionspot down.

        An exception that interrupts it comes out, and the next call goes on with what is left.
        """
        if self._pending == []:
            return
        with self._lock:
            if self._loading:  # a plug-in reads the register
                return
            self._loading = True
            try:
                self._load_pending()
            finally:
                self._loading = False

    def _load_pending(self) -> None:
        if self._pending is None:
            self._pending = list(entry_points(group=self._group))
        while self._pending:
            point = self._pending[0]
            try:
                self._register(*point.load())
            except Exception as error:
                if is_interrupt(error):
                    raise
                warnings.warn(
                    f"the plug-in {point.name} ({point.value}) cannot be used: {error}",
                    stacklevel=5,
                )
            del self._pending[0]


class Register(Mapping[str, RowT]):
    """Rows by name, in the order in which they were added.

    Args:
        kind: what messages call a row.
        plugins: loaded when the register is first read.
    """

    def __init__(self, kind: str, plugins: Plugins) -> None:
        self._kind, self._plugins = kind, plugins
        self._rows: dict[str, RowT] = {}

    def add(self, row: RowT) -> None:
        """Adds a row. Raises InputError for a name that is taken."""
        if row.name in self._rows:
            raise InputError(f"there is a {self._kind} {row.name!r} already")
        self._rows[row.name] = row

    def __getitem__(self, name: str) -> RowT:
        self._plugins.load()
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        self._plugins.load()
        return iter(tuple(self._rows))

    def __len__(self) -> int:
        self._plugins.load()
        return len(self._rows)


def load_object(name: str) -> Any:
    """Imports "module:name" and returns the function or class of that name."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
