"""A module in a process of its own: what it prints, and how its end is told."""

from __future__ import annotations

import time
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


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    """Else a stage that hangs would leave its own children on the GPU."""
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('{\"pid\": ' + str(child.pid) + '}\\n{\"cut', end='', flush=True)\n"
        "time.sleep(60)\n"
    )
    run = run_module("parent", environment={"PYTHONPATH": str(tmp_path)}, timeout_s=3.0)
    assert run.failure == "did not end in 3 s"
    (row,) = run.rows  # without the line that was cut off
    deadline = time.monotonic() + 10
    while _is_running(row["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(row["pid"])


def _is_running(pid: int) -> bool:
    """Also False for one that nobody has waited for yet."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
