"""Where a result comes from: the processor, the versions and the commit. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512-VNNI",
    "amx_tile": "AMX",
    "asimd": "NEON",
}
GIT_SECONDS = 30


@dataclass(frozen=True)
class Processor:
    """`cpus` are those that this process may use; `flags` what the system says of it, nothing where
    it says nothing.
    """

    model: str
    cpus: int | None
    flags: frozenset[str]

    @property
    def features(self) -> list[str]:
        """The vector extensions that decide how fast the CPU runtimes are."""
        return [label for flag, label in CPU_FEATURES.items() if flag in self.flags]


def read_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """The first of this machine's processors."""
    fields: dict[str, str] = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return Processor(
        fields.get("model name") or platform.processor() or platform.machine(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        frozenset((fields.get("flags") or fields.get("Features", "")).split()),
    )


def version_of(distribution: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def git_commit(mark_changes: bool = False) -> str | None:
    """The commit of the checkout that this code lies in; None elsewhere.

    Args:
        mark_changes: put "+changes" behind it where the checkout was edited since.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        changed = mark_changes and git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit
