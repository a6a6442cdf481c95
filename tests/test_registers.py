"""Registers, and the plug-ins that add rows to them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from regionspot.registers import Plugins, Register
from tests.plugins import install_entry_points
from tests.runtime.sharing import TimeIsOver

GROUP = "regionspot.test_rows"


@dataclass(frozen=True)
class Row:
    name: str


@pytest.fixture
def rows() -> Register[Row]:
    def add(*names: str) -> None:
        for name in names:
            register.add(Row(name))

    register: Register[Row] = Register("row", Plugins(GROUP, add))
    add("own")
    return register


@pytest.fixture(params=["KeyboardInterrupt", "a handler's own"])
def interruption(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    error = KeyboardInterrupt if request.param == "KeyboardInterrupt" else TimeIsOver

    def over(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, over)
    yield error
    signal.signal(signal.SIGALRM, before)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, code: str) -> None:
    (folder / f"{module}.py").write_text(code)
    install_entry_points(f"[{GROUP}]\ntoy = {module}:ROWS\n", folder)
    monkeypatch.syspath_prepend(folder)


def test_plugins_are_loaded_when_the_register_is_first_read(
    rows: Register[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "toy_rows", "ROWS = ('one', 'two')\n")
    assert list(rows) == ["own", "one", "two"] and rows["two"] == Row("two") and len(rows) == 3


def test_a_plugin_that_fails_is_a_warning(
    rows: Register[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "toy_broken_rows", "raise RuntimeError('broken')\n")
    with pytest.warns(UserWarning, match=r"toy \(toy_broken_rows:ROWS\) cannot be used: broken"):
        assert list(rows) == ["own"]


def test_a_reading_that_is_interrupted_is_made_up_for_by_the_next(
    rows: Register[Row],
    interruption: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = """
import pathlib, signal
tried = pathlib.Path(__file__).with_name("tried")
if not tried.exists():
    tried.touch()
    signal.raise_signal(signal.SIGALRM)
ROWS = ("late",)
"""
    install(tmp_path, monkeypatch, f"toy_{interruption.__name__}", code)
    with pytest.raises(interruption):
        list(rows)
    assert list(rows) == ["own", "late"]
