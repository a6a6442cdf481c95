"""How many threads a runtime gets by itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from regionspot import threads
from regionspot.threads import default_threads, physical_cores


def write_topology(directory: Path, cores: list[tuple[int, int]]) -> Path:
    """A CPU for each (package, core)."""
    for cpu, (package, core) in enumerate(cores):
        topology = directory / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")
    return directory


@pytest.mark.parametrize(
    ("cores", "count"),
    [
        ([(0, 0), (0, 1), (0, 0), (0, 1)], 2),  # two threads on each core
        ([(0, 0), (0, 1), (1, 0), (1, 1)], 4),  # two sockets number their cores alike
        ([(0, 0)], 1),
    ],
)
def test_threads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: list[tuple[int, int]], count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(cores))), raising=False)
    assert physical_cores(write_topology(tmp_path, cores)) == count


def test_only_cpus_that_the_process_may_use_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    assert physical_cores(write_topology(tmp_path, [(0, 0), (0, 1), (0, 2), (0, 3)])) == 2


def test_without_topology_every_cpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert physical_cores(tmp_path) == 3


@pytest.mark.parametrize(("content", "count"), [("150000 100000", 2), ("max 100000", 8), ("", 8), (None, 8)])
def test_a_containers_quota_bounds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, count: int
) -> None:
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "physical_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads() == count


@pytest.mark.parametrize(("asked", "count"), [("3", 3), ("5,2", 5), ("0", 8), ("many", 8), ("", 8)])
def test_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch, asked: str, count: int) -> None:
    monkeypatch.setattr(threads, "physical_cores", lambda: 8)
    monkeypatch.setattr(threads, "QUOTA", Path("absent"))
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert default_threads() == count
