"""Triton's model configurations, built as protobuf from the graphs' specs, and a lint for what
parsing alone misses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from regionspot.errors import ArtifactError
from regionspot.runtime.artifacts import spec_to_json
from regionspot.runtime.cuda_options import ONNX_RUNTIME_CUDA
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.pipeline import SIZES_ON_GPU
from regionspot.serving.contract import GPU_INDEX, INPUTS, MAX_BATCH, MODEL, OUTPUTS, Field

DTYPES = {
    "bool": pb.TYPE_BOOL,
    "uint8": pb.TYPE_UINT8,
    "int32": pb.TYPE_INT32,
    "float16": pb.TYPE_FP16,
    "float32": pb.TYPE_FP32,
    "bytes": pb.TYPE_STRING,
}
BATCH_AXIS = "batch"
POINTS_OF_A_BOX = 2
MAX_QUEUE_DELAY_US = 500
"""How long Triton waits for requests to batch with: far below what an image encoder takes on any
GPU.
"""

BACKENDS = {"cpu": "python", "tensorrt": "tensorrt", "onnxruntime": "onnxruntime"}
"""Target -> what runs a graph."""


def graph_config(spec: GraphSpec, target: str, file_name: str, batches: bool) -> pb.ModelConfig:
    """Of one graph's model.

    Triton batches requests only where each tensor has the images in front; the others take whole
    arrays.

    Args:
        target: one of `regionspot.serving.contract.TARGETS`.
        file_name: of the graph, in the model's version folder.
        batches: whether Triton puts requests together.
    """
    batched = can_batch(spec)
    config = pb.ModelConfig(
        name=spec.name,
        backend=BACKENDS[target],
        max_batch_size=spec.ranges[BATCH_AXIS].max if batched else 0,
        default_model_filename="model.py" if target == "cpu" else file_name,
    )
    skipped = 1 if batched else 0
    for tensor in spec.inputs:
        config.input.add(
            name=tensor.name,
            data_type=DTYPES[tensor.dtype],
            dims=_dims(spec, tensor.shape[skipped:]),
        )
    for tensor in spec.outputs:
        config.output.add(
            name=tensor.name,
            data_type=DTYPES[tensor.dtype],
            dims=_dims(spec, tensor.shape[skipped:]),
        )
    group = config.instance_group.add(count=1, kind=_kind(target))
    if target != "cpu":  # by default each GPU has an instance, and tensors are kept on the first
        group.gpus.append(GPU_INDEX)
    if batched and batches:
        config.dynamic_batching.max_queue_delay_microseconds = MAX_QUEUE_DELAY_US
    if target == "onnxruntime":
        cuda = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        cuda.parameters.update(ONNX_RUNTIME_CUDA)
    if target == "tensorrt":
        _add_cuda_graphs(config, spec)
    if target != "cpu":
        _add_warm_up(config, spec)
    config.parameters["spec"].string_value = _json(spec_to_json(spec))
    config.parameters["file"].string_value = file_name
    return config


def pipeline_config(batches: bool, parameters: Mapping[str, Any]) -> pb.ModelConfig:
    """Of the public model.

    Args:
        batches: whether it takes several requests at once. Where it runs the graphs itself, on a
            CPU, every picture has all cores for itself, and is answered sooner.
        parameters: name -> a plain value, stored as JSON: what clients and the model itself read.
    """
    config = pb.ModelConfig(
        name=MODEL, backend="python", max_batch_size=MAX_BATCH, default_model_filename="model.py"
    )
    for field in INPUTS:
        config.input.add(
            name=field.name,
            data_type=DTYPES[field.dtype],
            dims=field.dims,
            optional=field.optional,
            allow_ragged_batch=-1 in field.dims,
        )
    for field in OUTPUTS:
        config.output.add(name=field.name, data_type=DTYPES[field.dtype], dims=field.dims)
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    if batches:
        config.dynamic_batching.max_queue_delay_microseconds = 0
    for name, value in parameters.items():
        config.parameters[name].string_value = _json(value)
    return config


def _add_cuda_graphs(config: pb.ModelConfig, spec: GraphSpec) -> None:
    """Has Triton capture the sizes that the public model sends most: every batch of images, and
    chunks of boxes. Other sizes run kernel by kernel.
    """
    for sizes in _captured_sizes(spec):
        config.optimization.cuda.graphs = True
        batched = config.max_batch_size > 0
        captured = config.optimization.cuda.graph_spec.add(
            batch_size=sizes[BATCH_AXIS] if batched else 0
        )
        for tensor in spec.inputs:
            captured.input[tensor.name].dim.extend(tensor.resolved(sizes)[batched:])


def _captured_sizes(spec: GraphSpec) -> list[dict[str, int]]:
    axes = set(spec.ranges)
    if axes == {BATCH_AXIS}:
        batch = spec.ranges[BATCH_AXIS]
        return [{BATCH_AXIS: size} for size in range(batch.min, batch.max + 1)]
    if axes != {BATCH_AXIS, "prompts", "points", "tokens"}:
        return []
    step, most = SIZES_ON_GPU["prompt_step"], SIZES_ON_GPU["prompt_chunk"]
    fixed = {BATCH_AXIS: 1, "points": POINTS_OF_A_BOX, "tokens": 1}
    chunks = [{**fixed, "prompts": size} for size in range(step, most + 1, step)]
    return [
        sizes for sizes in chunks if all(size in spec.ranges[axis] for axis, size in sizes.items())
    ]


def _add_warm_up(config: pb.ModelConfig, spec: GraphSpec) -> None:
    """Has Triton run a model at its best and at its largest batch before it is ready: the first run
    of a size loads kernels.
    """
    best = spec.sizes("opt")
    batched = config.max_batch_size > 0
    batches = {best[BATCH_AXIS], config.max_batch_size} if batched else {1}
    for batch in sorted(batches):
        warm_up = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch)
        for tensor in spec.inputs:
            one = warm_up.inputs[tensor.name]
            one.data_type, one.zero_data = DTYPES[tensor.dtype], True
            one.dims.extend(tensor.resolved(best)[batched:])


def can_batch(spec: GraphSpec) -> bool:
    """Whether every tensor of a graph has the images in front, and it takes several: Triton's
    backends want an open axis there.
    """
    in_front = all(tensor.shape[0] == BATCH_AXIS for tensor in (*spec.inputs, *spec.outputs))
    return in_front and spec.ranges[BATCH_AXIS].min == 1 < spec.ranges[BATCH_AXIS].max


def parameters_of(config: pb.ModelConfig) -> dict[str, str]:
    return {name: value.string_value for name, value in config.parameters.items()}


def write_config(config: pb.ModelConfig) -> str:
    """As Triton's text format."""
    text: str = text_format.MessageToString(config)
    return text


def read_config(path: Path) -> pb.ModelConfig:
    """Raises ArtifactError for a file that is no model configuration."""
    try:
        config: pb.ModelConfig = text_format.Parse(
            path.read_text(encoding="utf-8"), pb.ModelConfig()
        )
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ArtifactError(
            f"{path} is no model configuration of Triton ({error}): run `regionspot-serve init`"
        ) from error
    return config


def lint(config: pb.ModelConfig, folder: Path) -> list[str]:
    """What Triton would refuse, or silently do otherwise than meant; one line each.

    Args:
        folder: the model's, with its versions in it.
    """
    return [
        *_file_problems(config, folder),
        *_tensor_problems(config),
        *_scheduling_problems(config),
    ]


def _file_problems(config: pb.ModelConfig, folder: Path) -> list[str]:
    found = []
    if config.name != folder.name:
        found.append(f"name {config.name!r} is not that of its folder, {folder.name!r}")
    versions = [path for path in sorted(folder.glob("*")) if path.is_dir() and path.name.isdigit()]
    if not versions:
        found.append("has no version folder, such as 1/")
    for version in versions:
        names = {
            config.default_model_filename or "model.py",
            parameters_of(config).get("file", "model.py"),
        }
        found += [
            f"{version.name}/{name} is missing"
            for name in sorted(names)
            if not (version / name).is_file()
        ]
    return found


def _tensor_problems(config: pb.ModelConfig) -> list[str]:
    found = []
    if not config.input or not config.output:
        found.append("has no inputs or no outputs")
    for tensor in (*config.input, *config.output):
        found += [
            f"{tensor.name} has an axis of {size}" for size in tensor.dims if size == 0 or size < -1
        ]
        if tensor.data_type == pb.TYPE_INVALID:
            found.append(f"{tensor.name} has no type")
    for tensors in (config.input, config.output):
        names = _repeated(tensor.name for tensor in tensors)
        found += [f"two tensors are called {name}" for name in names]
    return found


def _scheduling_problems(config: pb.ModelConfig) -> list[str]:
    """Of instances, batching and warm-up."""
    found = []
    if any(
        group.gpus and group.kind == pb.ModelInstanceGroup.KIND_CPU
        for group in config.instance_group
    ):
        found.append("names GPUs for instances on the CPU")
    batching = config.dynamic_batching
    if config.HasField("dynamic_batching") and config.max_batch_size < 1:
        found.append("batches requests, with a max_batch_size of 0")
    if any(size > config.max_batch_size for size in batching.preferred_batch_size):
        found.append(f"prefers batches of more than max_batch_size, {config.max_batch_size}")
    if config.HasField("dynamic_batching") and batching.HasField("default_queue_policy"):
        found.append(
            "has a default_queue_policy: with one instance some requests would wait for 500 ms"
        )
    found += [
        f"warm-up {warmup.name} leaves an axis open"
        for warmup in config.model_warmup
        if any(-1 in tensor.dims for tensor in warmup.inputs.values())
    ]
    return found


def fields_of(fields: Iterable[Field], batched: bool = True) -> str:
    """A table of tensors in Markdown, as in `docs/serve/wire-format.md`."""
    rows = ["| name | type | shape | |", "|---|---|---|---|"]
    for field in fields:
        shape = ", ".join(["B"] * batched + [str(size) if size > 0 else "?" for size in field.dims])
        rows.append(
            f"| `{field.name}` | {pb.DataType.Name(DTYPES[field.dtype])} | ({shape}) | "
            f"{field.meaning} |"
        )
    return "\n".join(rows)


def _dims(spec: GraphSpec, shape: tuple[int | str, ...]) -> list[int]:
    """-1 for an open axis; one that was exported with a single size has that."""

    def size_of(axis: int | str) -> int:
        if isinstance(axis, int):
            return axis
        allowed = spec.ranges.get(axis)
        return allowed.min if allowed is not None and allowed.min == allowed.max else -1

    return [size_of(axis) for axis in shape]


def _kind(target: str) -> int:
    return pb.ModelInstanceGroup.KIND_CPU if target == "cpu" else pb.ModelInstanceGroup.KIND_GPU


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
