"""A module in a process of its own: what it prints, and how its end is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from regionspot.child_process import run_module


@pytest.fixture
def path(tmp_path: Path) -> dict[str, str]:
    """An environment in which `worker` can be imported."""
    (tmp_path / "worker.py").write_text("""
import os, signal, sys, time
print('{"arguments": ' + str(len(sys.argv) - 1) + '}', flush=True)
print("not an object")
print('{"second": true}', flush=True)
if sys.argv[1] == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if sys.argv[1] == "hang":
    time.sleep(60)
if sys.argv[1] == "fail":
    sys.exit("first\\nthe last line")
""")
    return {"PYTHONPATH": str(tmp_path)}


def test_what_it_prints(path: dict[str, str]) -> None:
    run = run_module("worker", "well", 7, environment=path)
    assert run.failure is None
    assert run.rows == [{"arguments": 2}, {"second": True}]
    assert b"not an object" in run.output


@pytest.mark.parametrize(
    ("how", "failure"),
    [
        ("crash", "crashed (SIGSEGV)"),
        ("fail", "ended with status 1: the last line"),
        ("hang", "did not end in 2 s"),
    ],
)
def test_how_it_ended(path: dict[str, str], how: str, failure: str) -> None:
    run = run_module("worker", how, environment=path, timeout_s=2.0)
    assert run.failure == failure
    assert run.rows[0] == {"arguments": 1}  # what it said before is kept
