"""Progress: one line on a terminal, few lines elsewhere."""

from __future__ import annotations

import io

import pytest

from regionspot.progress import Progress, in_hours


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_the_first_and_the_last_line() -> None:
    stream = io.StringIO()
    with Progress("run", 1000, "steps", stream=stream) as progress:
        for step in range(1, 1001):
            progress.update(step, "loss 0.5" if step % 100 == 0 else "")
    lines = stream.getvalue().splitlines()
    assert (
        lines[0].startswith("run: 1/1000 steps")
        and lines[-1] == "run: 1000/1000 steps  loss 0.5  done"
    )
    assert len(lines) <= 3


def test_a_terminal_gets_one_line_of_its_width() -> None:
    stream = Terminal()
    with Progress("run", 3, "steps", stream=stream) as progress:
        progress.update(3, "x" * 500)
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().startswith("\rrun: 3/3 steps")
    assert max(map(len, stream.getvalue().split("\r"))) < 200


def test_nothing_to_do() -> None:
    stream = io.StringIO()
    with Progress("features", 5, "images", start=5, stream=stream):
        pass
    assert stream.getvalue() == "features: 5/5 images\n"


def test_hours() -> None:
    assert [in_hours(s) for s in (0, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]


def test_it_leaves_standard_output_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("run", 1, "steps") as progress:
        progress.update(1)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("run: 1/1 steps  done\n")
