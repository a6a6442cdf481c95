"""Which runtimes there are, which artefacts each opens, and opening one: the library is imported only then."""

from __future__ import annotations

import re
from pathlib import Path

from regionspot.errors import InputError
from regionspot.runtime.engine_file import FLAVOURS
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.runner import Runner

NATIVE = "native"
"""The format of weights for our own kernels, and the runtime that they are; see `regionspot.runtime.native_runner`."""

FORMATS = ("onnx", "openvino", "tensorrt", "tensorrt-rtx", NATIVE)
CPU_FORMATS = ("onnx", "openvino")
"""What runs whole models on a CPU, with NATIVE in place of some of their graphs."""

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", NATIVE: ".npz"}
SUFFIXES |= {name: flavour.suffix for name, flavour in FLAVOURS.items()}
RUNTIME_FORMATS = {
    "onnxruntime": ("onnx",),
    "openvino": ("openvino", "onnx"),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
}
"""Runtime of whole models -> the formats that it opens, the preferred one first.

The runtime "torch" opens weights, not artefacts."""

FORMAT_OPTION = {"onnx": "onnx", "openvino": "openvino", "tensorrt": "trt", "tensorrt-rtx": "trt-rtx"}
"""Format -> the option of `regionspot-export` that asks for it."""

FORMAT_RUNTIME = {
    "onnx": "onnxruntime",
    **{name: name for name in ("openvino", "tensorrt", "tensorrt-rtx", NATIVE)},
}
"""Format -> the runtime that it is verified in."""


def open_graph(
    path: Path,
    spec: GraphSpec,
    runtime: str,
    precision: str,
    device: str = "auto",
    threads: int | None = None,
    cuda_graph: bool = False,
) -> Runner:
    """A runner of a file in a runtime, which is imported only now.

    Args:
        runtime: a key of RUNTIME_FORMATS, or NATIVE.
        precision: of the graph.
        device: for ONNX Runtime "cpu", "cuda", "cuda:1", or "tensorrt", its provider of that name; OpenVINO and
            NATIVE work on "cpu", TensorRT on "cuda". "auto" is a GPU where the runtime can use one.
        threads: of runtimes on the CPU; None lets them choose.
        cuda_graph: of ONNX Runtime on CUDA: capture the graph once and replay it, which saves the launches of its
            kernels. Each axis must have one size: `regionspot-export --batch 1` makes such image encoders.
            TensorRT's runners do so without being asked.

    Raises:
        InputError: the runtime is not installed, the device is not there or not one that it works on, or the graph
            cannot be captured.
        ArtifactError: it cannot load the file, or the file is not the spec's graph.
    """
    if cuda_graph and runtime != "onnxruntime":
        raise InputError(f"cuda_graph is an option of onnxruntime, not of {runtime}: leave it out")
    if runtime == "onnxruntime":
        from regionspot.runtime.ort_runner import OrtRunner, best_device

        provider, index = _provider_of(best_device() if device == "auto" else device)
        return OrtRunner(path, spec, provider, threads, precision, index, cuda_graph)
    if runtime == "openvino":
        from regionspot.runtime.openvino_runner import OpenVinoRunner

        _check_device(runtime, device, ("auto", "cpu"))
        return OpenVinoRunner(path, spec, threads=threads)
    if runtime == NATIVE:
        from regionspot.runtime.native_runner import NativeRunner

        _check_device(runtime, device, ("auto", "cpu"))
        return NativeRunner(path, spec, threads)
    if runtime in FLAVOURS:
        from regionspot.runtime.trt_runner import TrtRunner

        _check_device(runtime, device, ("auto", "cuda"))
        return TrtRunner(path, spec, runtime)
    raise InputError(f"there is no runtime {runtime!r} for artefacts: choose one of {', '.join(RUNTIME_FORMATS)}")


def _provider_of(device: str) -> tuple[str, int]:
    """ONNX Runtime's provider and which GPU: "cuda:1" to ("cuda", 1)."""
    found = re.fullmatch(r"(cpu)|(cuda|tensorrt)(?::([0-9]+))?", device)
    if found is None:
        allowed = "auto, cpu, cuda, cuda:1, tensorrt or tensorrt:1"
        raise InputError(f"the runtime onnxruntime works on {allowed}, not on {device}")
    return found[1] or found[2], int(found[3] or 0)


def _check_device(runtime: str, device: str, allowed: tuple[str, ...]) -> None:
    if device not in allowed:
        raise InputError(f"the runtime {runtime} works on {' or '.join(allowed)}, not on {device}")
