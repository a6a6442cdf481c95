"""Engines from ONNX files: TensorRT on the machine that has the GPU, TensorRT-RTX ahead of time and
without one.

Both are strongly typed: each layer's precision stands in the ONNX file. TensorRT tunes on the GPU
that it builds on, TensorRT-RTX compiles for a list of GPUs and tunes where the engine runs.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from regionspot import __version__
from regionspot.errors import ArtifactError, InputError
from regionspot.export.made_with import build_host, gpu_here
from regionspot.export.making import Making
from regionspot.export.trt_layers import is_detail, report_of
from regionspot.export.trt_progress import PERCENT, monitor_of
from regionspot.files import write_atomically
from regionspot.progress import Progress
from regionspot.runtime.engine_compatibility import in_words
from regionspot.runtime.engine_file import (
    DYNAMIC,
    HARDWARE_LEVELS,
    EngineSidecar,
    EngineTensor,
    Flavour,
    check_tensors,
    file_sha256,
    flavour_named,
    profile_of,
    write_engine,
)
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.trt_library import (
    NUMPY_NAMES,
    Messages,
    create_runtime,
    engine_tensors,
    listen,
    load_library,
    logger_of,
)

RTX_CAPABILITIES = (80, 86, 89, 120, 121)
"""What an RTX engine is for unless told otherwise: Ampere, Ada, Blackwell and GB10.

Turing (75) only when asked for: TensorRT-RTX multiplies only fp16 matrices on it, so few graphs
build for it; and engines for several GPUs become slower where it is one of them (NVIDIA's support
matrix).
"""

FP8_CAPABILITIES = tuple(one for one in RTX_CAPABILITIES if one >= 89)
"""The same of an engine in fp8, which Ada multiplies and later GPUs do."""

RTX_WORKSPACE_MIB = 1 << 20
"""What TensorRT-RTX may plan with, where nothing is asked for: without a GPU to ask it supposes 64
GiB, and refuses graphs whose largest shapes need more. `TrtRunner` allocates what the shapes at
hand need.
"""

RTX_OPTIONS = ("compute_capabilities",)
TENSORRT_OPTIONS = ("version_compatible", "hardware_compatibility")
"""Of `EngineOptions`, those that one flavour alone has."""

OPTIMIZATION_LEVELS = range(6)
DEFAULT_OPTIMIZATION_LEVEL = 3
MAX_ERRORS = 5


def make(making: Making) -> None:
    """Builds an engine from the ONNX file of the same precision, with a line of progress."""
    assert making.source is not None
    step, options = making.step, asdict(making.engine)
    others = RTX_OPTIONS if step.format == "tensorrt" else TENSORRT_OPTIONS
    for name in others:  # what engines of the other flavour are for
        options.pop(name)
    if step.format != "tensorrt" and step.precision == "fp8":
        options["compute_capabilities"] = options["compute_capabilities"] or FP8_CAPABILITIES
    with Progress(f"building {step.title}", PERCENT, "percent") as progress:
        build_engine(
            making.source, step.spec, making.path, step.format, **options, progress=progress
        )


def settings(making: Making) -> dict[str, Any]:
    """Returns what an engine depends on besides its ONNX file."""
    engine = making.engine
    found: dict[str, Any] = {
        "engine": [engine.compute_capabilities, engine.optimization_level, engine.workspace_mib]
    }
    if making.step.format == "tensorrt":
        found["gpu"] = gpu_here()
        found["compatible"] = [engine.version_compatible, engine.hardware_compatibility]
    return found


def build_engine(
    onnx_path: str | Path,
    spec: GraphSpec,
    out: str | Path,
    flavour: str = "tensorrt",
    compute_capabilities: Sequence[int] | None = None,
    optimization_level: int = DEFAULT_OPTIMIZATION_LEVEL,
    workspace_mib: int | None = None,
    timing_cache: str | Path | None = None,
    version_compatible: bool = False,
    hardware_compatibility: str | None = None,
    progress: Progress | None = None,
) -> EngineSidecar:
    """Build the engine of a graph; its profile spans the spec's ranges in every dynamic axis of
    every input.

    Matrix products of fp32 stay fp32: TF32 is off. The tensors are compared with the spec:
    TensorRT's of the engine, loaded again; TensorRT-RTX's of the parsed network, since an engine
    does not load without a GPU.

    Args:
        onnx_path: the graph; external data lies beside it.
        spec: its tensors and ranges.
        out: the engine, `.plan` or `.engine` by custom. The sidecar becomes `.json` beside it;
            where it is, both are whole.
        flavour: "tensorrt" or "tensorrt-rtx".
        compute_capabilities: of the GPUs that will run an RTX engine, 89 for 8.9; None is
            `RTX_CAPABILITIES`.
        optimization_level: 0 builds fastest, 5 searches longest. It makes no difference to
            TensorRT-RTX.
        workspace_mib: bound of the memory beside weights, inputs and outputs, for the largest
            shapes; None is what the GPU has, and no bound for TensorRT-RTX.
        timing_cache: a file that makes later builds faster, read where it is and written again.
            TensorRT-RTX leaves it alone: it times nothing while it builds, and with a cache it
            would look for a GPU.
        version_compatible: build an engine for later releases of TensorRT too. It holds code of
            its own, and uses only what a lean runtime has: NVIDIA says that it may be slower.
        hardware_compatibility: one of `HARDWARE_LEVELS`, for other GPUs than this machine's; fewer
            kernels and fusions remain. None is this GPU alone.
        progress: of `regionspot.export.trt_progress.PERCENT`; None shows nothing.

    Raises:
        InputError: TensorRT is not installed or finds no GPU, or an option is out of its range.
        ArtifactError: the ONNX file cannot be read, TensorRT cannot take it, or its tensors are not
            the spec's.
    """
    onnx_path, out = Path(onnx_path), Path(out)
    if optimization_level not in OPTIMIZATION_LEVELS:
        raise InputError(
            f"the optimisation level is 0 to {OPTIMIZATION_LEVELS[-1]}, not {optimization_level}"
        )
    if workspace_mib is not None and workspace_mib < 1:
        raise InputError(f"the workspace is 1 MiB or more, not {workspace_mib}")
    wanted, is_rtx = flavour_named(flavour), flavour == "tensorrt-rtx"
    _check_compatibility(is_rtx, version_compatible, hardware_compatibility)
    sources = _hash_sources(onnx_path)
    trt = load_library(flavour)
    capabilities = _checked_capabilities(trt, flavour, compute_capabilities)
    log = listen(trt, is_detail)
    began = time.monotonic()

    builder = _create_builder(trt, log, wanted)
    network, parser = _parse(trt, log, builder, onnx_path, wanted)
    inputs, outputs = _network_tensors(onnx_path, spec, network)
    check_tensors(onnx_path, spec, inputs, outputs)
    _refuse_misread_shapes(onnx_path, network, wanted)
    config = _create_config(trt, builder, capabilities, optimization_level, workspace_mib)
    _ask_for_compatibility(trt, config, version_compatible, hardware_compatibility)
    _add_profile(builder, config, spec, inputs)
    cache_file = None if is_rtx or timing_cache is None else Path(timing_cache)
    cache = _load_timing_cache(log, config, cache_file) if cache_file else None
    plan = _serialise(trt, builder, network, config, progress)
    if plan is None:
        raise ArtifactError(_why_not_built(onnx_path, wanted, log.errors))
    _refuse_inconsistent_profiles(onnx_path, log.warnings)
    content = bytes(memoryview(plan))
    del plan, parser, network  # as large as the weights, each
    report = report_of(log.details)
    scratch_mib = report.scratch_mib if report else None
    if not is_rtx:
        engine = create_runtime(trt, version_compatible).deserialize_cuda_engine(content)
        _check_loaded(trt, log, engine, out, spec)
        scratch_mib = round(engine.device_memory_size_v2 / 2**20, 1)
    if cache_file and cache:
        write_atomically(cache_file, bytes(memoryview(cache.serialize())))

    gpu = None if is_rtx else gpu_here()
    sidecar = EngineSidecar(
        graph=spec.name,
        flavour=flavour,
        file=out.name,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        versions={trt.__name__: str(trt.__version__), "regionspot": __version__},
        compute_capabilities=capabilities,
        device=gpu[0] if gpu else None,
        optimization_level=optimization_level,
        workspace_mib=workspace_mib,
        build_s=round(time.monotonic() - began, 3),
        inputs=inputs,
        outputs=outputs,
        onnx=sources,
        warnings=tuple(dict.fromkeys(log.warnings)),
        layers=report.to_json() if report else {},
        scratch_mib=scratch_mib,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
        built_on=None if is_rtx else build_host(),
    )
    write_engine(out, content, sidecar)
    return sidecar


def _check_compatibility(is_rtx: bool, version: bool, hardware: str | None) -> None:
    """Raises InputError for what TensorRT does not offer."""
    if is_rtx and (version or hardware is not None):
        raise InputError(
            "TensorRT-RTX builds for its own release and for the compute capabilities that are "
            "named: leave version and hardware compatibility out, or build with tensorrt"
        )
    if hardware not in (None, *HARDWARE_LEVELS):
        raise InputError(
            f"there is no hardware compatibility {hardware!r}: choose one of "
            f"{', '.join(HARDWARE_LEVELS)}"
        )


def _checked_capabilities(trt: Any, flavour: str, wanted: Sequence[int] | None) -> tuple[int, ...]:
    if flavour == "tensorrt":
        if wanted:
            raise InputError(
                "TensorRT builds for the GPU of this machine, whatever its compute capability: "
                "leave them out, or build with tensorrt-rtx"
            )
        return ()
    capabilities = tuple(sorted(set(RTX_CAPABILITIES if wanted is None else wanted)))
    known = sorted(
        int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM")
    )
    if unknown := [capability for capability in capabilities if capability not in known]:
        raise InputError(
            f"TensorRT-RTX {trt.__version__} builds for the compute capabilities "
            f"{in_words(known)}, not {in_words(unknown)}: leave it out, or build with tensorrt on "
            "that GPU"
        )
    if not capabilities:
        raise InputError(
            f"an engine is for one compute capability at least: name some of {in_words(known)}"
        )
    return capabilities


def _hash_sources(onnx_path: Path) -> dict[str, str]:
    """sha256 of the ONNX file and, where it is, of the external data beside it."""
    external = onnx_path.with_name(onnx_path.name + ".data")
    try:
        return {
            path.name: file_sha256(path)
            for path in (onnx_path, external)
            if path == onnx_path or path.exists()
        }
    except OSError as error:
        raise ArtifactError(
            f"cannot read the ONNX file {onnx_path}: {error.strerror}. Export it first."
        ) from error


def _create_builder(trt: Any, log: Messages, wanted: Flavour) -> Any:
    try:
        return trt.Builder(logger_of(trt))
    except (TypeError, RuntimeError) as error:  # pybind11's answer to a null pointer
        raise InputError(
            f"{wanted.title} cannot start: it builds on the GPU that will run the engine, and "
            f"finds none here. {log.told()} Build on that machine, or with tensorrt-rtx, which "
            "needs none."
        ) from error


def _parse(
    trt: Any, log: Messages, builder: Any, onnx_path: Path, wanted: Flavour
) -> tuple[Any, Any]:
    """The network, and the parser that its weights belong to: keep it until the engine is built."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger_of(trt))
    if not parser.parse_from_file(str(onnx_path)):
        found = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        more = f"; and {len(found) - MAX_ERRORS} more" if len(found) > MAX_ERRORS else ""
        raise ArtifactError(
            f"{wanted.title} cannot take {onnx_path}: "
            f"{'; '.join(found[:MAX_ERRORS]) or log.told()}{more}"
        )
    return network, parser


def _parser_error(error: Any) -> str:
    """ "node /Transpose (Transpose): Invalid Node ...", without the CUDA noise of a machine that
    has no GPU.
    """
    lines = [line.strip() for line in error.desc().splitlines()]
    reason = (
        " ".join(line for line in lines if line and "catchCudaError" not in line) or error.desc()
    )
    name, operator = error.node_name(), error.node_operator()
    return f"node {name or '?'} ({operator}): {reason}" if name or operator else reason


def _network_tensors(
    onnx_path: Path, spec: GraphSpec, network: Any
) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
    """Inputs and outputs of a parsed network, the inputs with the profile that the spec asks
    for.
    """
    profiles = profile_of(spec)
    inputs = []
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise ArtifactError(
                f"{onnx_path}: values of the input {tensor.name} decide the shapes of other "
                "tensors, which no graph of ours does: export it again"
            )
        inputs.append(_as_engine_tensor(tensor, profiles.get(tensor.name)))
    outputs = [_as_engine_tensor(network.get_output(index)) for index in range(network.num_outputs)]
    return tuple(inputs), tuple(outputs)


def _as_engine_tensor(tensor: Any, profile: Any = None) -> EngineTensor:
    return EngineTensor(
        tensor.name, NUMPY_NAMES.get(tensor.dtype.name, "?"), tuple(tensor.shape), profile
    )


def _refuse_misread_shapes(onnx_path: Path, network: Any, wanted: Flavour) -> None:
    """TensorRT reads some operators otherwise than ONNX means them, and does not say so.

    Seen with TensorRT-RTX 1.7.1: the product of a vector with (B, C, M) is (1, M) to it, and the
    engine right for one image alone. So the shape of every tensor is compared with the one that
    stands in the file.
    """
    declared = {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else DYNAMIC if dim.dim_param else None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in onnx.load(onnx_path, load_external_data=False).graph.value_info
    }
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        for tensor in (layer.get_output(index) for index in range(layer.num_outputs)):
            shape = declared.get(tensor.name) if tensor is not None else None
            if shape is not None and not _reads(tensor.shape, shape):
                raise ArtifactError(
                    f"{wanted.title} misreads {onnx_path}: the tensor {tensor.name} is "
                    f"{tuple(tensor.shape)} to it instead of {shape}. Write that operator in "
                    "another way."
                )


def _reads(shape: Sequence[int], declared: Sequence[int | None]) -> bool:
    """Whether TensorRT's shape is the declared one: None is any size, and TensorRT need not know a
    size.
    """
    return len(shape) == len(declared) and all(
        size == wanted or wanted is None or (size == DYNAMIC and wanted >= 0)
        for size, wanted in zip(shape, declared, strict=True)
    )


def _create_config(
    trt: Any,
    builder: Any,
    capabilities: Sequence[int],
    optimization_level: int,
    workspace_mib: int | None,
) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = optimization_level
    config.clear_flag(trt.BuilderFlag.TF32)
    # so that the builder's log lists the kernels, and profilers name them by their layers
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    bound = workspace_mib or (RTX_WORKSPACE_MIB if capabilities else None)
    if bound is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, bound << 20)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(
                trt.ComputeCapability.__members__[f"SM{capability}"], index
            )
    return config


def _ask_for_compatibility(trt: Any, config: Any, version: bool, hardware: str | None) -> None:
    """With other releases of TensorRT, and with other GPUs."""
    if version:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if hardware is not None:
        level = trt.HardwareCompatibilityLevel.__members__[hardware.upper()]
        config.hardware_compatibility_level = level


def _add_profile(
    builder: Any, config: Any, spec: GraphSpec, inputs: Sequence[EngineTensor]
) -> None:
    """One profile, of every input that has a dynamic axis."""
    profile = builder.create_optimization_profile()
    dynamic = {
        tensor.name: tensor.profile
        for tensor in inputs
        if DYNAMIC in tensor.shape and tensor.profile
    }
    for name, (smallest, best, largest) in dynamic.items():
        profile.set_shape(name, smallest, best, largest)
    if dynamic and config.add_optimization_profile(profile) < 0:
        shapes = ", ".join(f"{name} {given}" for name, given in dynamic.items())
        raise ArtifactError(f"TensorRT refuses the profile of {spec.name}: {shapes}")


def _load_timing_cache(log: Messages, config: Any, path: Path) -> Any:
    """The file's cache, or an empty one where there is none or it is another GPU's or version's."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise InputError(f"cannot read the timing cache {path}: {error.strerror}") from error
    for candidate in (content, b""):
        cache = config.create_timing_cache(candidate)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        log.warnings.append(
            f"the timing cache {path} is another GPU's or version's: it is made anew"
        )
    return None


def _serialise(trt: Any, builder: Any, network: Any, config: Any, progress: Progress | None) -> Any:
    """The engine's bytes, or None where TensorRT fails. With a monitor Ctrl-C ends the build at its
    next step.
    """
    monitor = monitor_of(trt, progress) if progress else None
    if monitor is not None:
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.stopped_by is not None:
        raise monitor.stopped_by
    if progress and plan is not None:
        progress.update(PERCENT)
    return plan


HINTS = {
    "SM75": "TensorRT-RTX multiplies only fp16 matrices on Turing (7.5): leave that compute "
    "capability out.",
    "fp8_e4m3": "fp8 is for compute capability 8.9 (Ada) and later: leave older ones out.",
    "OutOfMemory": "The largest shapes take more memory than the workspace: narrow the ranges, or "
    "give more workspace.",
}


def _why_not_built(onnx_path: Path, wanted: Flavour, errors: Sequence[str]) -> str:
    told = [error for error in dict.fromkeys(errors) if "catchCudaError" not in error] or list(
        errors
    )
    reason = "; ".join(told[:MAX_ERRORS]) or "it gives no reason"
    hints = [hint for sign, hint in HINTS.items() if sign in reason]
    return " ".join([f"{wanted.title} cannot build {onnx_path}: {reason}.", *hints])


def _refuse_inconsistent_profiles(onnx_path: Path, warnings: Sequence[str]) -> None:
    """TensorRT only warns where the graph cannot run at an end of its ranges."""
    if found := [warning for warning in warnings if "not self-consistent" in warning]:
        raise ArtifactError(
            f"{onnx_path} does not run at an end of its ranges: {'; '.join(found)}. Narrow the "
            "ranges."
        )


def _check_loaded(trt: Any, log: Messages, engine: Any, out: Path, spec: GraphSpec) -> None:
    if engine is None:
        raise ArtifactError(f"the new engine {out} does not load. {log.told()}")
    check_tensors(out, spec, *engine_tensors(trt, engine))
