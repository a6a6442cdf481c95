"""How many threads a runtime gets by itself, on made-up machines and on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from regionspot import threads
from regionspot.cgroups import memory_bytes
from regionspot.threads import NO_LIMIT, cpu_quota, default_threads, physical_cores


def write_files(root: Path, contents: Mapping[str, str]) -> Path:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def write_topology(root: Path, siblings: Sequence[str], name: str = "core_cpus_list") -> Path:
    """A CPU for each list of the CPUs that share its core."""
    folder = "sys/devices/system/cpu"
    return write_files(
        root,
        {f"{folder}/cpu{cpu}/topology/{name}": f"{text}\n" for cpu, text in enumerate(siblings)},
    )


def allow(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus), raising=False)


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
@pytest.mark.parametrize(
    ("siblings", "count"),
    [
        (["0,2", "1,3", "0,2", "1,3"], 2),  # two threads on each core
        (["0", "1", "2", "3"], 4),  # also two sockets or dies that number their cores alike
        (["0-1", "0-1", "2-3", "2-3"], 2),
        (["0"], 1),
    ],
)
def test_threads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siblings: list[str], count: int, name: str
) -> None:
    allow(monkeypatch, *range(len(siblings)))
    assert physical_cores(write_topology(tmp_path, siblings, name)) == count


def test_numbers_of_cores_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without topology prints package -1 and core 0 for every CPU: they are not one
    core.
    """
    allow(monkeypatch, 0, 1, 2, 3)
    topology = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": value
        for cpu in range(4)
        for name, value in (("physical_package_id", "-1\n"), ("core_id", "0\n"))
    }
    assert physical_cores(write_files(tmp_path, topology)) == 4


def test_only_cpus_that_the_process_may_use_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, 1, 2)
    assert physical_cores(write_topology(tmp_path, ["0", "1", "2", "3"])) == 2


def test_without_topology_every_cpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 0, 1, 2)
    assert physical_cores(tmp_path) == 3


V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "31 25 0:27 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
)
MACHINES: dict[str, tuple[dict[str, str], int]] = {
    "no control groups": ({}, NO_LIMIT),
    "a container": (
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
        2,
    ),
    "no limit": (
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
        NO_LIMIT,
    ),
    "systemd's CPUQuota=": (
        {
            "proc/self/cgroup": "0::/system.slice/spot.service\n",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system.slice/spot.service/cpu.max": "300000 100000\n",
        },
        3,
    ),
    "a group above is narrower": (
        {
            "proc/self/cgroup": "0::/a/b/c\n",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/a/b/c/cpu.max": "400000 100000\n",
        },
        2,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n0::/\n",
            "proc/self/mountinfo": V1.format(top="/"),
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
    "version 1 seen from inside the container": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n",
            "proc/self/mountinfo": V1.format(top="/docker/abc"),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1 without a limit": (
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "proc/self/mountinfo": V1.format(top="/"),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        NO_LIMIT,
    ),
    "both versions": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/a\n0::/b\n",
            "proc/self/mountinfo": V1.format(top="/")
            + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "700000\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/unified/b/cpu.max": "600000 100000\n",
        },
        6,
    ),
    "a group outside of the namespace": (
        {
            "proc/self/cgroup": "0::/../other\n",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/cpu.max": "500000 100000\n",
        },
        5,
    ),
    "a mount with a space": (
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2.replace("/sys/fs/cgroup", r"/my\040groups"),
            "my groups/cpu.max": "100000 100000\n",
        },
        1,
    ),
    "nonsense": (
        {
            "proc/self/cgroup": "0\n::\n\n4:cpu\n0::/\n",
            "proc/self/mountinfo": f"1 2\n - \n{V2}",
            "sys/fs/cgroup/cpu.max": "many 0\n",
        },
        NO_LIMIT,
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_quotas_bound_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    contents, quota = MACHINES[machine]
    assert cpu_quota(write_files(tmp_path, contents)) == quota
    allow(monkeypatch, *range(8))
    monkeypatch.setattr(threads, "ROOT", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads() == min(quota, 8)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"a/memory.max": "1073741824\n", "a/b/memory.max": "max\n"}, 1 << 30),
        ({"a/memory.max": "1073741824\n", "a/b/memory.max": "4096\n"}, 4096),
        ({}, None),
        ({"a/memory.max": "lots\n"}, None),
    ],
)
def test_memory(tmp_path: Path, limits: dict[str, str], expected: int | None) -> None:
    groups = {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": V2}
    files = {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes(write_files(tmp_path, groups | files)) == (expected or machine)


def test_memory_of_version_1(tmp_path: Path) -> None:
    contents = {
        "proc/self/cgroup": "4:memory:/docker/abc\n",
        "proc/self/mountinfo": V1.format(top="/").replace("cpu,cpuacct", "memory"),
        "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "2147483648\n",
    }
    assert memory_bytes(write_files(tmp_path, contents)) == 2 << 30


@pytest.mark.parametrize(("asked", "count"), [("3", 3), ("5,2", 5), ("0", 8), ("many", 8), ("", 8)])
def test_what_the_environment_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, count: int
) -> None:
    allow(monkeypatch, *range(8))
    monkeypatch.setattr(threads, "ROOT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert default_threads() == count


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_a_process_that_is_kept_to_one_cpu() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        " from regionspot.threads import default_threads; print(default_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    ).stdout
    assert printed == b"1\n"
