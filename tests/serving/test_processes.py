"""Processes as the supervisor sees them: stubs by model, dead ones, and ids that the system has
reused.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from regionspot.serving import log_file, processes
from regionspot.serving.environment import Installation
from regionspot.serving.leftovers import delete_unused
from regionspot.serving.log_file import LogFile
from regionspot.serving.processes import (
    STUB,
    cpu_seconds,
    has_dead_stub,
    has_ended,
    running_stubs,
    send_signal,
    start_ticks,
)
from regionspot.serving.records import ServerRecord
from regionspot.serving.server import LAUNCHER

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


def test_a_child_that_has_ended_keeps_its_id_until_it_is_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not has_ended(child.pid)
    child.kill()
    wait_for_zombie(child.pid)
    assert has_ended(child.pid) and has_ended(child.pid)
    assert Path(f"/proc/{child.pid}").exists()
    child.communicate()
    assert has_ended(child.pid) and not Path(f"/proc/{child.pid}").exists()


def test_a_signal_reaches_no_process_with_a_reused_id() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_ticks(child.pid)
    assert started is not None
    assert not send_signal(child.pid, started - 1, signal.SIGTERM)
    assert child.poll() is None
    assert send_signal(child.pid, started, signal.SIGTERM)
    child.communicate()
    assert child.returncode == -signal.SIGTERM
    assert not send_signal(child.pid, started, signal.SIGTERM)


def test_processor_time() -> None:
    before = cpu_seconds([os.getpid()])
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        pass
    assert cpu_seconds([os.getpid()]) > before
    assert cpu_seconds([2**22 + 1]) == 0


def launched(*command: str, max_bytes: int = 1 << 20) -> list[str]:
    return [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), str(max_bytes), *command]


def test_a_child_ends_with_its_parent() -> None:
    """Even when the parent is killed, and can end nothing itself."""
    code = f"""
import os, subprocess, sys, time
launcher = [sys.executable, "-I", "-S", {str(LAUNCHER)!r}, str(os.getpid()), "1000"]
child = subprocess.Popen([*launcher, "/bin/sleep", "60"])
print(child.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + WAIT_S
        while Path(f"/proc/{pid}/comm").read_text() != "sleep\n":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        parent.kill()
    wait_for_zombie(pid)


def test_a_launched_process_writes_no_large_files(tmp_path: Path) -> None:
    """It is refused, and not killed: as if the disk were full."""
    code = f"""
import signal
print(signal.getsignal(signal.SIGXFSZ), signal.getsignal(signal.SIGPIPE))
with open({str(tmp_path / "file")!r}, "wb") as file:
    try:
        file.truncate(2 << 20)
    except OSError as error:
        print(error.strerror)
"""
    command = launched(sys.executable, "-c", code)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "File too large" in done.stdout, done


def test_a_child_whose_parent_is_gone_does_not_start() -> None:
    command = launched("/bin/echo", "started")
    command[4] = "1"
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")


class TestLogFiles:
    def test_they_are_rotated_under_their_writer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(log_file, "MAX_BYTES", 1000)
        log = LogFile(tmp_path / "new" / "log")
        with log.open() as file:
            for line in range(500):
                os.write(file.fileno(), f"line {line:04}\n".encode())
                log.rotate()
        parts = [log.path.with_name(name) for name in ("log.2", "log.1", "log")]
        assert sorted(path.name for path in log.path.parent.iterdir()) == ["log", "log.1", "log.2"]
        assert all(path.stat().st_size <= 1010 for path in parts)
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in parts)
        written = "".join(path.read_text() for path in parts).splitlines()
        assert written == [f"line {line:04}" for line in range(500 - len(written), 500)]

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        log = LogFile(tmp_path / "log")
        with log.open() as file:
            file.truncate(log_file.MAX_BYTES + 1)
            monkeypatch.setattr(shutil, "copyfileobj", full)
            log.rotate()
            os.write(file.fileno(), b"goes on\n")
        assert log.path.read_bytes() == b"goes on\n" and len(list(tmp_path.iterdir())) == 1

    def test_its_end_is_read_alone(self, tmp_path: Path) -> None:
        log = LogFile(tmp_path / "log")
        log.path.write_text("of an earlier start\n")
        with log.open() as file:
            assert "earlier" not in log.tail()
            for _ in range(200):
                os.write(file.fileno(), b"x" * 9999 + b"\n")
            os.write(file.fileno(), b"the reason\n")
        assert log.tail().splitlines()[-2] == "the reason" and len(log.tail()) < 10_000

    def test_what_is_no_file_is_left_as_it_is(self) -> None:
        log = LogFile(Path("/dev/null"))
        before = log.path.stat().st_mode
        log.open(empty=True).close()
        log.rotate()
        assert log.path.stat().st_mode == before and "which is no file" in log.tail()


def test_folders_of_other_releases_are_deleted(tmp_path: Path) -> None:
    """Those that nobody uses, and used lately."""
    names = ("package-used", "package-mine", "package-recent", "package-old", "environment-old")
    for name in (*names, "logs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        if name != "package-recent":
            os.utime(tmp_path / name, (0, 0))
    started = start_ticks(os.getpid())
    assert started is not None
    record = ServerRecord(os.getpid(), started, "repository", "cpu", "log")
    mine = Installation(Path("tritonserver"), Path("backends"), folders=("package-mine",))

    record.write(tmp_path)  # as an earlier release did, which does not say what it uses
    delete_unused(tmp_path, mine)
    assert all((tmp_path / name).is_dir() for name in names)

    replace(record, uses=("package-used",)).write(tmp_path)
    delete_unused(tmp_path, mine)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"package-used", "package-mine", "package-recent", "logs", "running"}
