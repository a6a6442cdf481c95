"""`regionspot doctor [--json]`: what works on this machine, what does not, and how to mend it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import regionspot
from regionspot.child_process import run_module
from regionspot.cli.findings import Finding
from regionspot.cli.probes import PROBES
from regionspot.errors import InputError
from regionspot.files import cache_root
from regionspot.provenance import read_processor

OLDEST_PYTHON = (3, 11)
LOW_MEMORY_GIB = 4.0  # SAM ViT-B with its activations, and the head
LOW_DISK_GIB = 5.0  # a feature cache and a few checkpoints
PROBES_SECONDS = 120
GIB = 2**30


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot doctor",
        description="Report versions, devices and which runtimes work here. Exits with 1 if "
        "something required fails.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    findings = examine()
    failed = [finding.name for finding in findings if finding.required and finding.status == "FAIL"]
    if arguments.json:
        listed = [asdict(finding) for finding in findings]
        print(
            json.dumps(
                {"regionspot": regionspot.__version__, "ok": not failed, "findings": listed},
                indent=2,
            )
        )
    else:
        print(as_text(findings))
        print(
            f"Required, but failing: {', '.join(failed)}."
            if failed
            else "Everything required works."
        )
    return 1 if failed else 0


def examine() -> list[Finding]:
    """All findings: the machine first, then everything that is tried in a child process."""
    return [check_python(), check_cpu(), check_memory(), check_disk(), *run_probes(list(PROBES))]


def as_text(findings: Sequence[Finding]) -> str:
    lines = [f"regionspot {regionspot.__version__}"]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        lines.append(f"{finding.status:<5} {finding.name:<{width}}  {finding.detail}")
        if finding.mend:
            lines.append(f"{'':<6}{'':<{width}}    to mend: {finding.mend}")
    return "\n".join(lines)


def run_probes(names: Sequence[str]) -> list[Finding]:
    """A finding of each probe, from a child process; where one takes the child down, a new child
    goes on after it.
    """
    findings: list[Finding] = []
    while len(findings) < len(names):
        pending = names[len(findings) :]
        child = run_module("regionspot.cli.probes", *pending, timeout_s=PROBES_SECONDS)
        found = _parse(child.output)
        findings += found
        if len(found) < len(pending):
            culprit = pending[len(found)]
            probe = PROBES[culprit]
            mend = probe.mend("--force-reinstall")
            findings.append(
                Finding(
                    culprit,
                    "FAIL",
                    f"trying it {child.failure or 'gave no result'}",
                    mend,
                    probe.required,
                )
            )
    return findings


def check_python() -> Finding:
    detail = f"{platform.python_version()} on {platform.platform()}"
    if sys.version_info >= OLDEST_PYTHON:
        return Finding("python", "OK", detail, required=True)
    return Finding(
        "python", "FAIL", f"{detail}: older than 3.11", "use Python 3.11 or later", required=True
    )


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """Model, usable cores and the vector extensions that decide how fast the CPU runtimes are."""
    cpu = read_processor(cpuinfo)
    detail = (
        f"{cpu.model}, {cpu.cpus} cores, {' '.join(cpu.features) or 'no vector extensions known'}"
    )
    if cpu.flags and not {"avx2", "asimd"} & cpu.flags:
        return Finding(
            "cpu",
            "WARN",
            detail,
            "expect slow inference: a CPU with AVX2 or NEON is several times faster",
        )
    return Finding("cpu", "OK", detail)


def check_memory(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> Finding:
    """Memory available to this process: the machine's, or its container's limit where that is
    lower.
    """
    if not meminfo.is_file():
        return Finding("memory", "OK", "unknown on this system")
    sizes = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if ":" in line
    }
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total, available = min(total, int(text)), min(available, int(text))
    detail = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < LOW_MEMORY_GIB * GIB:
        return Finding(
            "memory",
            "WARN",
            detail,
            f"full-size models want {LOW_MEMORY_GIB:.0f} GiB; regionspot_mini does not",
        )
    return Finding("memory", "OK", detail)


def check_disk() -> Finding:
    """Free space where training writes (here) and where text embeddings are cached."""
    try:
        cache = cache_root()
        above = next(place for place in (cache, *cache.parents) if os.path.exists(place))
        places = {"here": Path.cwd(), "cache": above}
        free = {name: shutil.disk_usage(place).free for name, place in places.items()}
    except (
        OSError,
        InputError,
    ) as error:  # this folder was deleted, or may not be looked at; a cache that is nowhere
        mend = "change to a folder that exists, or set REGIONSPOT_CACHE to one"
        return Finding("disk", "WARN", f"cannot be examined: {error}", mend)
    detail = ", ".join(
        f"{size / GIB:.1f} GiB free {name if name == 'here' else 'for the cache'}"
        for name, size in free.items()
    )
    if min(free.values()) < LOW_DISK_GIB * GIB:
        return Finding(
            "disk", "WARN", detail, "free some space, or set REGIONSPOT_CACHE to another disk"
        )
    return Finding("disk", "OK", detail)


def _parse(output: bytes) -> list[Finding]:
    lines = output.decode(errors="replace").splitlines()
    # not a library's own chatter
    return [Finding(**json.loads(line)) for line in lines if line.startswith('{"name"')]
