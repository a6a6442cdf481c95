"""A run's log: one JSON object a line, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from regionspot.errors import ArtifactError
from regionspot.files import why_not_written, write_atomically


class MetricsLog:
    """Appends to `metrics.jsonl` in a run's directory. Use as a context manager.

    Args:
        start: steps done before. Lines of later steps, left by a run that was killed, are taken
            out.
        tensorboard: write event files as well, if the package is there.
    """

    def __init__(self, directory: Path, start: int, tensorboard: bool) -> None:
        path = directory / "metrics.jsonl"
        if path.exists():
            write_atomically(path, _lines_up_to(path, start))
        self._file = path.open("a", encoding="utf-8")
        self._board = _open_tensorboard(directory / "tensorboard", start) if tensorboard else None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def write(self, step: int, **values: Any) -> None:
        """Add a line, with null for numbers that are not finite. Raises ArtifactError if the disk
        is full.
        """
        values = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise ArtifactError(
                f"the log {self._file.name} cannot be written: {why_not_written(error)}. "
                "Checkpoints are whole; go on with --resume auto"
            ) from error
        if self._board:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _lines_up_to(path: Path, step: int) -> bytes:
    return b"".join(
        line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step
    )


def _step_of(line: bytes) -> float:
    """The step of a line, infinity for one that was being written when its run was killed."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _open_tensorboard(directory: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=start + 1)
