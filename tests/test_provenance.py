"""Facts about this machine and checkout. What is read of a processor is tested in
test_doctor.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from regionspot.provenance import driver_version, git_commit, version_of


def test_the_commit_of_this_checkout() -> None:
    commit, marked = git_commit(), git_commit(mark_changes=True)
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}", commit)
    assert marked is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", marked)
    assert marked in (commit, f"{commit}+changes")


def test_versions_of_distributions() -> None:
    assert version_of("numpy") == np.__version__
    assert version_of("no-such-distribution") is None


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build",
            "580.95.05",
        ),
    ],
)
def test_the_driver_by_its_kernel_module(tmp_path: Path, line: str, version: str) -> None:
    file = tmp_path / "version"
    file.write_text(f"{line}\nGCC version:  gcc version 13.3.0\n")
    assert driver_version(file) == version


def test_the_driver_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version(tmp_path / "version") is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    program.chmod(0o755)
    assert driver_version(tmp_path / "version") == "580.95.05"
    program.write_text("#!/bin/sh\necho no devices were found\nexit 9\n")
    assert driver_version(tmp_path / "version") is None
