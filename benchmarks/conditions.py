"""What a number is worth nothing without: the machine, the versions and the commit it was measured with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import regionspot
from regionspot.export.manifest import git_commit, version_of

PACKAGES = ("torch", "segment-anything", "open_clip_torch", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino")
CPU_FEATURES = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_vnni": "AVX512-VNNI", "amx_tile": "AMX"}


def conditions(**more: Any) -> dict[str, Any]:
    """Machine, versions and commit; `more` is what only the benchmark knows, such as threads and precision."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")), None)
    flags = next((set(line.partition(":")[2].split()) for line in cpu.splitlines() if line.startswith("flags")), set())
    return {
        "processor": model or platform.processor() or platform.machine(),
        "features": [name for flag, name in CPU_FEATURES.items() if flag in flags],
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "regionspot": regionspot.__version__,
        "commit": git_commit(),
        **{name: version for name in PACKAGES if (version := version_of(name)) is not None},
        **more,
    }
