"""What a number is worth nothing without: the machine, the versions and the commit it was measured
with.
"""

from __future__ import annotations

import platform
from typing import Any

import regionspot
from regionspot.provenance import git_commit, read_processor, version_of

PACKAGES = (
    "torch",
    "segment-anything",
    "open_clip_torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt_rtx-cu13-bindings",
)


def conditions(**more: Any) -> dict[str, Any]:
    """Machine, versions and commit; `more` is what only the benchmark knows, such as threads and
    precision.
    """
    processor = read_processor()
    return {
        "processor": processor.model,
        "features": processor.features,
        "cpus": processor.cpus,
        "system": platform.platform(),
        "python": platform.python_version(),
        "regionspot": regionspot.__version__,
        "commit": git_commit(mark_changes=True),
        **{name: version for name in PACKAGES if (version := version_of(name)) is not None},
        **more,
    }
