"""Devices by name."""

from __future__ import annotations

import pytest

from regionspot.errors import InputError
from regionspot.modeling.devices import resolve_device


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["meta", "cuda:99", "abacus", ""])
def test_devices_that_cannot_be_used_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"the device {name} cannot be used here .*: try cpu"):
        resolve_device(name)
