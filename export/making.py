"""What the function that makes a format's files is given; see
`regionspot.runtime.formats.Format.maker`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regionspot.export.plan import Step
from regionspot.modeling.regionspot import RegionSpot


@dataclass(frozen=True)
class EngineOptions:
    """For TensorRT's engines, see `regionspot.export.trt_engine.build_engine`."""

    compute_capabilities: tuple[int, ...] | None = None
    optimization_level: int = 3
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: str | None = None


@dataclass(frozen=True)
class Making:
    """One artefact to make.

    Args:
        step: graph, format and precision.
        path: the file to write. It must appear whole or not at all.
        source: the ONNX file to make it from; None for what is made from the model.
        model: the PyTorch model.
        preprocessing: fingerprint of what happens to an image before the graphs, for the file's
            metadata.
        calibration: inputs of the graph that come from images, for int8; computed when it is
            called.
        engine: options of TensorRT.
    """

    step: Step
    path: Path
    source: Path | None
    model: RegionSpot
    preprocessing: str
    calibration: Callable[[], Sequence[Mapping[str, Any]]]
    engine: EngineOptions = EngineOptions()
