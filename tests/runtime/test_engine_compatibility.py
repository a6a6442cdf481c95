"""Which TensorRT and which GPU load an engine, by what its sidecar says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from regionspot.runtime.engine_compatibility import in_words, why_not_loadable
from regionspot.runtime.engine_file import BuildHost, EngineSidecar

PLAIN = EngineSidecar(
    graph="region_head",
    flavour="tensorrt",
    file="region_head.plan",
    size_bytes=1,
    sha256="",
    versions={"tensorrt": "11.2.0.31", "regionspot": "0.1.0"},
    compute_capabilities=(),
    device="NVIDIA L4",
    optimization_level=3,
    workspace_mib=None,
    build_s=1.0,
    inputs=(),
    outputs=(),
    onnx={},
    built_on=BuildHost(89, "580.95.05", "13.0"),
)
OLDER = replace(PLAIN, built_on=None)
RTX = replace(
    PLAIN,
    flavour="tensorrt-rtx",
    versions={"tensorrt_rtx_bindings": "1.7.1.116"},
    compute_capabilities=(89, 120),
    device=None,
    built_on=None,
)
LATER = replace(PLAIN, version_compatible=True)
TEN = replace(LATER, versions={"tensorrt": "10.9.0.34"})
AMPERE = replace(PLAIN, hardware_compatibility="ampere_plus")
RULE = "version-compatible engines load in later releases of the same major version"
SAME = replace(PLAIN, hardware_compatibility="same_compute_capability")


@pytest.mark.parametrize(
    ("sidecar", "version", "capability"),
    [
        (PLAIN, "11.2.0.31", 89),
        (PLAIN, "11.2.0.31.post1", 89),  # packaged again
        (PLAIN, "11.2.0", 89),
        (PLAIN, None, None),
        (PLAIN, None, 89),
        (PLAIN, "11.2.0.31", None),
        (OLDER, "11.2.0.31", 90),  # it does not say
        (replace(PLAIN, versions={}), "10.9.0.34", 89),
        (LATER, "11.2.0.31", 89),
        (LATER, "11.2.0.32", 89),
        (LATER, "11.10.0.1", 89),
        (TEN, "10.16.1.11", 89),
        (TEN, "11.4.0.106", 89),
        (AMPERE, "11.2.0.31", 80),
        (AMPERE, "11.2.0.31", 120),
        (SAME, "11.2.0.31", 89),
        (RTX, "1.7.1.116", 120),
    ],
)
def test_loadable(sidecar: EngineSidecar, version: str | None, capability: int | None) -> None:
    assert why_not_loadable(sidecar, version, capability) is None


@pytest.mark.parametrize(
    ("sidecar", "version", "capability", "reason"),
    [
        (PLAIN, "11.4.0.106", 89, "was built by TensorRT 11.2.0.31, and this is 11.4.0.106"),
        (PLAIN, "11.2.0.30", None, "was built by TensorRT 11.2.0.31, and this is 11.2.0.30"),
        (PLAIN, "11.3", None, "was built by TensorRT 11.2.0.31, and this is 11.3"),
        (
            LATER,
            "11.1.0.9",
            89,
            f"was built by TensorRT 11.2.0.31, and this is 11.1.0.9: {RULE}",
        ),
        (
            replace(LATER, versions={"tensorrt": "9.3.0.1"}),
            "11.2.0.31",
            None,
            f"was built by TensorRT 9.3.0.1, and this is 11.2.0.31: {RULE}",
        ),
        (
            PLAIN,
            "11.2.0.31",
            90,
            "was built on NVIDIA L4, of compute capability 8.9, and this GPU has 9.0",
        ),
        (
            replace(SAME, device=None),
            None,
            86,
            "was built on a GPU, of compute capability 8.9, and this GPU has 8.6",
        ),
        (
            AMPERE,
            None,
            75,
            "was built for compute capability 8.0 and later, and this GPU has 7.5",
        ),
        (
            RTX,
            "1.7.1.116",
            86,
            "was built for GPUs of compute capability 8.9, 12.0, and this GPU has 8.6",
        ),
        (RTX, "1.8.0.1", 89, "was built by TensorRT-RTX 1.7.1.116, and this is 1.8.0.1"),
        (
            PLAIN,
            "10.9.0.34",
            75,
            "was built by TensorRT 11.2.0.31, and this is 10.9.0.34; was built on NVIDIA L4, of "
            "compute capability 8.9, and this GPU has 7.5",
        ),
    ],
)
def test_not_loadable(
    sidecar: EngineSidecar, version: str | None, capability: int | None, reason: str
) -> None:
    assert why_not_loadable(sidecar, version, capability) == reason


def test_capabilities_in_words() -> None:
    assert in_words((75, 89, 120)) == "7.5, 8.9, 12.0"
