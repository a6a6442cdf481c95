"""A lock on a directory: refused or waited for, released by a killed process, not needed where
there are no locks.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from regionspot.errors import ArtifactError, InputError
from regionspot.locks import LOCK_FILE, locked

HOLD = """
import sys
from pathlib import Path
from regionspot.locks import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a directory until its input ends."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_held_lock_is_refused_with_the_callers_message(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "directory"
    with (
        other_process(directory),
        pytest.raises(InputError, match=r"^try later$"),
        locked(directory, busy="try later"),
    ):
        pytest.fail("two processes hold one lock")


def test_a_lock_excludes_threads_of_one_process(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="busy"), locked(tmp_path, busy="busy"):
        pytest.fail("held twice")
    with locked(tmp_path, busy="busy"):
        pass


def test_a_waiting_process_gets_the_lock_when_it_is_released(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        assert process.stdin is not None
        timer = threading.Timer(0.3, process.stdin.close)
        timer.start()
        with locked(tmp_path):
            assert not timer.is_alive()
        timer.join()
        assert process.wait(10) == 0


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        process.kill()
        process.wait(10)
        with locked(tmp_path, busy="still held"):
            pass


def test_the_lock_file_stays(tmp_path: Path) -> None:
    with locked(tmp_path):
        inode = (tmp_path / LOCK_FILE).stat().st_ino
    assert (tmp_path / LOCK_FILE).stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.skipif(sys.platform == "win32", reason="flock is of Unix")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_nothing_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with locked(tmp_path), locked(tmp_path, busy="held"):
        # no marker that outlives a killed process
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_an_error_inside_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path, busy="still held"):
        pass


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below_a_file = tmp_path / "file" / "directory"
    with (
        pytest.raises(ArtifactError, match=r"cannot write to .*file.directory"),
        locked(below_a_file),
    ):
        pytest.fail("no such directory")
