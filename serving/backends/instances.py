"""The copies of the model that answer side by side, and who has which."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from regionspot.errors import InputError
from regionspot.predictor import RegionPredictor
from regionspot.serving.backends.budget import POLL_S, Budget

INSTANCES_VARIABLE, THREADS_VARIABLE = "REGIONSPOT_INSTANCES", "REGIONSPOT_THREADS"
"""How `regionspot-serve up --instances N --threads M` tells the process of the model."""

MOST_INSTANCES = 4
BYTES_PER_WEIGHT_BYTE = 4
"""By default there are no more instances than this, nor so many that the machine has less memory
than this for each byte of weights in one of them: runtimes pack weights anew, and need room to
work.
"""


@dataclass(frozen=True)
class CpuInstances:
    """How the cores of a CPU are shared out.

    Args:
        instances: that answer side by side.
        threads: of each of them.
        all_threads: of the one that answers while it is alone.
    """

    instances: int
    threads: int
    all_threads: int


def cpu_instances(
    variables: Mapping[str, str], cores: int, weight_bytes: int, memory_bytes: int
) -> CpuInstances:
    """What the variables ask for; by default up to MOST_INSTANCES instances that share all cores.
    An image is answered soonest by all cores together, and most images in an hour are by cores that
    do not wait for each other.

    Args:
        weight_bytes: of one instance.
        memory_bytes: of the machine.

    Raises:
        InputError: a variable that is no number from 1 on.
    """
    instances = _number(variables, INSTANCES_VARIABLE)
    threads = _number(variables, THREADS_VARIABLE)
    if instances is None:
        copies = memory_bytes // (BYTES_PER_WEIGHT_BYTE * max(weight_bytes, 1))
        # one more is alone
        instances = max(min(MOST_INSTANCES, cores // (threads or 1), copies - 1), 1)
    return CpuInstances(instances, threads or max(cores // instances, 1), threads or cores)


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{name} must be a number from 1 on, not {text!r}")
    return int(text)


class Instances:
    """Predictors that are lent out, each to one thread at a time. Safe for several threads at once.

    Args:
        side_by_side: these share the machine's cores.
        alone: one with all cores for itself, lent while no other is; None where there is no
            difference.
    """

    def __init__(
        self, side_by_side: Sequence[RegionPredictor], alone: RegionPredictor | None = None
    ) -> None:
        self._spare, self._count = list(side_by_side), len(side_by_side)
        self._alone, self._alone_is_lent = alone, False
        self._given_back = threading.Condition()

    def __len__(self) -> int:
        """How many answer side by side."""
        return self._count

    @contextlib.contextmanager
    def lend(self, budget: Budget) -> Iterator[RegionPredictor]:
        """Waits for a predictor that is spare.

        Raises:
            ServingError: TIMEOUT, the request is over before there is one.
        """
        predictor = self._take(budget)
        try:
            yield predictor
        finally:
            with self._given_back:
                if predictor is self._alone:
                    self._alone_is_lent = False
                else:
                    self._spare.append(predictor)
                self._given_back.notify()

    def _take(self, budget: Budget) -> RegionPredictor:
        with self._given_back:
            while True:
                budget.check()
                lent = self._count - len(self._spare) + self._alone_is_lent
                if lent == 0 and self._alone is not None:
                    self._alone_is_lent = True
                    return self._alone
                if lent < self._count:
                    return self._spare.pop()
                self._given_back.wait(POLL_S)
