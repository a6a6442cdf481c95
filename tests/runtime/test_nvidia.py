"""The driver and its GPUs, of a machine with another. What doctor says of them is tested in
tests/test_doctor.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from regionspot.runtime.nvidia import Gpu, read_driver


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
def test_the_driver_by_its_kernel_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, version: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "version"
    file.write_text(f"{line}\nGCC version:  gcc version 13.3.0\n")
    driver = read_driver(file)
    assert driver is not None and driver.version == version and not driver.gpus


def test_gpus_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, 23034, 8.9, 580.95.05, NVIDIA L4'\n")
    program.chmod(0o755)
    driver = read_driver(tmp_path / "none")
    assert driver is not None and driver.version == "580.95.05"
    assert driver.gpus == (Gpu("0", "NVIDIA L4", 23034, (8, 9)),)
    assert driver.gpus[0].compute_capability == 89
