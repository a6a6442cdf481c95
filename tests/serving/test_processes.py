"""Processes as the supervisor sees them: stubs by model, dead ones, and ids that the system has
reused.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regionspot.serving import processes
from regionspot.serving.processes import STUB, has_dead_stub, running_stubs, start_ticks

WAIT_S = 10.0


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Child processes of this one that are called like Triton's, by model."""
    script = tmp_path / STUB
    script.write_text("#!/bin/sh\nread line\n")
    script.chmod(0o755)
    children = {}
    for model, instance in (("region_head", "region_head_0_1"), ("regionspot", "regionspot_0_0")):
        command = [str(script), f"/models/{model}/1/model.py", "triton_shm", instance, "/backends"]
        children[model] = subprocess.Popen(command, stdin=subprocess.PIPE)
    yield children
    for child in children.values():
        child.kill()
        child.communicate()


def wait_for_zombie(pid: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while start_ticks(pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stubs_are_found_by_model(stubs: dict[str, subprocess.Popen[bytes]]) -> None:
    pids = {model: child.pid for model, child in stubs.items()}
    assert dict(running_stubs(os.getpid())) == pids
    assert not has_dead_stub(os.getpid())
    assert running_stubs(pids["regionspot"]) == []  # it has no children


def test_a_killed_stub_is_dead_until_it_is_waited_for(
    stubs: dict[str, subprocess.Popen[bytes]],
) -> None:
    stubs["regionspot"].kill()
    wait_for_zombie(stubs["regionspot"].pid)
    assert [model for model, _ in running_stubs(os.getpid())] == ["region_head"]
    assert has_dead_stub(os.getpid())
    stubs["regionspot"].wait()
    assert not has_dead_stub(os.getpid())


def test_start_ticks_tell_processes_apart() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own, started = start_ticks(os.getpid()), start_ticks(child.pid)
    assert own is not None and started is not None and own < started
    assert start_ticks(child.pid) == started
    child.kill()
    wait_for_zombie(child.pid)  # a process that ended, even if nobody waits for it
    child.communicate()
    assert start_ticks(child.pid) is None


def test_only_orphaned_shared_memory_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SHARED_MEMORY", tmp_path)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    own = f"regionspot_{os.getpid()}_1_"
    foreign = "other_1_1_"
    orphaned = f"regionspot_{child.pid}_1_"
    for name in (own, foreign, orphaned):
        (tmp_path / name).touch()
    processes.remove_orphaned_shared_memory()
    assert {path.name for path in tmp_path.iterdir()} == {own, foreign}
    processes.remove_shared_memory(own)
    assert [path.name for path in tmp_path.iterdir()] == [foreign]


def test_a_child_ends_with_its_parent() -> None:
    """Even when the parent is killed, and can end nothing itself."""
    code = """
import subprocess, sys, time
from regionspot.serving.processes import terminate_with_parent
child = subprocess.Popen(["sleep", "60"], preexec_fn=terminate_with_parent)
print(child.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert start_ticks(pid) is not None
        parent.kill()
    wait_for_zombie(pid)
