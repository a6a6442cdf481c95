"""Registers: rows by name, to which other packages add theirs by entry points."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

from regionspot.errors import InputError


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
        self._begun = self._loaded = False

    def load(self) -> None:
        """Adds the rows, once. A plug-in that fails is a warning: it must not take regionspot
        down.
        """
        if self._loaded:
            return
        with self._lock:
            # by another thread before, or by this one: a plug-in reads the register
            if self._begun:
                return
            self._begun = True
            for point in entry_points(group=self._group):
                try:
                    self._register(*point.load())
                except Exception as error:
                    warnings.warn(
                        f"the plug-in {point.name} ({point.value}) cannot be used: {error}",
                        stacklevel=4,
                    )
            self._loaded = True


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
