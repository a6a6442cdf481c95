"""What every kind of fuzzing shares: how a case is run and what counts as a failure."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from regionspot.errors import ArtifactError, InputError, RegionSpotError

SEED = 15
MAX_MESSAGE = 1000
ValueT = TypeVar("ValueT")


class Target(Protocol):
    """One kind of input and the public entry points that read it."""

    def run(self, rng: random.Random, note: Callable[[str], None]) -> bool:
        """Makes one input, gives it to the entry points and checks the answer.

        Args:
            rng: decides everything that the case does.
            note: takes in words what was done to the input, for the report of a failure.

        Returns:
            Whether the input was accepted; False where it was refused as it should be.

        Raises:
            WrongAnswer: the answer breaks an invariant.
        """
        ...


class WrongAnswer(AssertionError):
    """An input was accepted and its answer is not right, or it was refused without a usable
    message.
    """


class OutOfMemory(AssertionError):
    """An input was refused because it took more memory than a case may have."""


def make_rng(kind: str, case: int, seed: int = SEED) -> random.Random:
    """The generator of one case: the same in every run, whichever cases ran before."""
    return random.Random(f"{seed}/{kind}/{case}")


def attempt(call: Callable[[], ValueT]) -> ValueT | RegionSpotError:
    """What `call` returns, or the error that it raised on purpose; any other exception is let
    through.

    Raises:
        WrongAnswer: the error is of no documented class, or its message is empty, long or of
            several lines.
        OutOfMemory: the error stands for a MemoryError.
    """
    try:
        return call()
    except RegionSpotError as error:
        _check_error(error)
        return error


def check(condition: bool, message: str) -> None:
    """Raises WrongAnswer with the message unless the condition holds."""
    if not condition:
        fail(message)


def fail(message: str) -> NoReturn:
    raise WrongAnswer(message)


def write(directory: Path, name: str, content: bytes) -> Path:
    """The path of a new file; one that an earlier case left is replaced."""
    path = directory / name
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def _check_error(error: RegionSpotError) -> None:
    if _comes_from_memory(error):
        raise OutOfMemory(str(error)) from error
    text = str(error)
    check(
        isinstance(error, (InputError, ArtifactError)),
        f"an error of the class {type(error).__name__}: {text}",
    )
    check(bool(text.strip()), "an error without a message")
    check(len(text) <= MAX_MESSAGE, f"a message of {len(text)} characters: {text[:200]}...")
    check(len(text.splitlines()) == 1, f"a message of several lines: {text!r}")


def _comes_from_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
