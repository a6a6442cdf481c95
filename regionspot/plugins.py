"""Rows that packages outside of regionspot add to its registers, by entry points."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import entry_points


def register_plugins(group: str, register: Callable[..., None]) -> None:
    """Passes the rows that each entry point of a group names to `register(*rows)`.

    A plug-in that cannot be loaded, or whose rows are refused, is a warning.
    """
    for point in entry_points(group=group):
        try:
            register(*point.load())
        except Exception as error:  # a broken plug-in must not take regionspot down
            warnings.warn(f"the plug-in {point.name} ({point.value}) cannot be used: {error}", stacklevel=2)
