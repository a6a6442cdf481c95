"""A target with every fault that the harness must notice, in the order of the cases."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable
from pathlib import Path

from regionspot.errors import InputError
from tests.fuzz.target import attempt, fail


class Faulty:
    """Case 0 is accepted and 1 refused; 2 to 7 fail: see FAULTS in test_fuzz.py."""

    def __init__(self, directory: Path) -> None:
        self._case = -1

    def begin(self, case: int) -> None:
        """The harness tells each case's number to a target that asks for it."""
        self._case = case

    def run(self, rng: random.Random, note: Callable[[str], None]) -> bool:
        note(f"case {self._case}")
        if self._case == 1:
            attempt(self._refuse)
            return False
        if self._case == 2:
            ctypes.string_at(0)
        if self._case == 3:
            time.sleep(600)
        if self._case == 4:
            bytearray(1 << 40)
        if self._case == 5:
            raise KeyError("boxes")
        if self._case == 6:
            fail("two answers differ")
        if self._case == 7:
            attempt(self._refuse_in_many_lines)
        return True

    def _refuse(self) -> None:
        raise InputError("a box has a coordinate that is no number")

    def _refuse_in_many_lines(self) -> None:
        raise InputError("one\ntwo")
