"""PyTorch graphs to ONNX files: traced with dynamic axes, folded, named after the spec, checked."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
from onnxscript import ir
from onnxscript import opset20 as op
from torch import nn

from regionspot.errors import ArtifactError, InputError
from regionspot.export.making import Making
from regionspot.export.onnx_files import save
from regionspot.export.onnx_passes import name_nodes, simplify
from regionspot.modeling.graphs import graph_module
from regionspot.modeling.precision import precision_of
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.formats import CPU, FORMATS
from regionspot.runtime.graph_spec import GraphSpec, Range
from regionspot.runtime.tolerance import QUANTIZED

OPSET = 20
MASKED_SCORE = -30_000.0
"""An attention score that is as good as minus infinity, within half precision and without its
NaN.
"""

_DTYPES = {dtype: getattr(torch, dtype) for dtype in ("uint8", "int32", "float32", "bool")}


def make(making: Making) -> None:
    """Exports a graph in fp32, or converts the fp32 file to another precision."""
    if making.source is None:
        export_onnx(
            making.model,
            making.step.spec,
            making.path,
            {"preprocessing": making.preprocessing},
            FORMATS[making.step.format].target,
        )
        return
    precision, half = making.step.precision, making.step.spec.half_tensors
    if precision in QUANTIZED:
        from regionspot.export.quantization import REST, quantize

        rest = REST[FORMATS[making.step.format].target]
        quantize(making.source, making.calibration(), making.path, rest, precision, half)
    else:
        from regionspot.export.precision import write_half

        write_half(making.source, making.path, precision, half)


def export_onnx(
    model: RegionSpot,
    spec: GraphSpec,
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    target: str = CPU,
) -> None:
    """Write one graph of a model as ONNX in single precision.

    Tensors are called and ordered as in `spec`, with its dynamic axes; nodes after the modules they
    come from, such as `sam.image_encoder.blocks.0.attn.qkv/MatMul`, which is what
    `regionspot.export.precision` goes by. Beyond 2 GB the weights lie beside it in `path` +
    ".data".

    Args:
        spec: one of `graph_specs(model_info(model))`.
        path: of the `.onnx` file. It appears whole or not at all.
        metadata: more entries for the file's metadata.
        target: CPU or GPU, what the graph is laid out for.

    Raises:
        InputError: the model is in half precision.
        ArtifactError: what came out is not what `spec` says, or not valid ONNX.
    """
    if (precision := precision_of(model)) != "fp32":
        raise InputError(
            f"the model is in {precision}, and export converts precisions itself: call "
            "model.float(), or make the model without dtype"
        )
    with _exporting():
        graph_model = trace(graph_module(model, spec.name, target), spec, model.device)
        simplify(graph_model)
    name_nodes(graph_model.graph)
    graph_model.graph.name = spec.name
    check_tensors(graph_model, spec)
    graph_model.metadata_props.update(
        {
            "graph": spec.name,
            "model": model.name,
            "precision": "fp32",
            "target": target,
            **(metadata or {}),
        }
    )
    save(graph_model, path)


def trace(module: nn.Module, spec: GraphSpec, device: torch.device) -> ir.Model:
    """The module as the exporter gives it, neither folded nor optimised."""
    sizes = tracing_sizes(spec.ranges)
    arguments = tuple(
        torch.ones(tensor.resolved(sizes), dtype=_DTYPES[tensor.dtype], device=device)
        for tensor in spec.inputs
    )
    dims: dict[int | str, torch.export.Dim] = {
        axis: torch.export.Dim(axis, min=allowed.min, max=allowed.max)
        for axis, allowed in spec.ranges.items()
        if allowed.min < allowed.max
    }
    dynamic_shapes = tuple(
        {i: dims[axis] for i, axis in enumerate(tensor.shape) if axis in dims}
        for tensor in spec.inputs
    )
    program = torch.onnx.export(
        module,
        arguments,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(spec.input_names),
        output_names=list(spec.output_names),
        dynamic_shapes=dynamic_shapes,
        custom_translation_table={
            torch.ops.aten.scaled_dot_product_attention.default: _attention,
            torch.ops.aten.einsum.default: _einsum,
        },
        optimize=False,
        verbose=False,
    )
    assert program is not None
    return program.model


def tracing_sizes(ranges: Mapping[str, Range]) -> dict[str, int]:
    """A size for each axis to trace with: within its range, no two alike, and not 1, which PyTorch
    takes for fixed.

    Where a range leaves no choice, two axes may be alike.
    """
    sizes: dict[str, int] = {}
    for axis, allowed in sorted(ranges.items(), key=lambda item: item[1].max):
        candidates = range(min(max(allowed.min, 2), allowed.max), allowed.max + 1)
        sizes[axis] = next(
            (size for size in candidates if size not in sizes.values()), candidates[0]
        )
    return sizes


@contextmanager
def _exporting() -> Iterator[None]:
    """Without gradients, without `nn.MultiheadAttention`'s fused kernel, which has no ONNX form,
    in silence, and without the cache of shapes that tracing keeps: with open axes its keys and
    entries take more time than they save, more than half of it in all.
    """
    fast_path, logger = torch.backends.mha.get_fastpath_enabled(), logging.getLogger("onnxscript")
    level = logger.level
    torch.backends.mha.set_fastpath_enabled(False)
    logger.setLevel(logging.ERROR)
    try:
        with (
            torch.no_grad(),
            torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        logger.setLevel(level)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """(B, H, N, d) attention in the form that runtimes recognise and fuse.

    The exporter's own adds a dozen nodes to transpose the keys and guards against rows that see
    nothing, of which there are none here: `regionspot.modeling.head.attendable` and causal masks
    leave each query something.
    """
    assert not dropout_p and not is_causal and not enable_gqa
    factor = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    scaled = op.Mul(query, op.Constant(value_float=factor))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))  # (B, H, N, M)
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        scores = op.Where(attn_mask, scores, op.Constant(value_float=MASKED_SCORE))
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _einsum(equation: str, tensors: Sequence[Any], path: Any = None) -> Any:
    """Those of SAM's relative positions as MatMul, which every runtime has in every precision."""
    if equation == "bhwc,hkc->bhwk":
        queries, rows = tensors
        return op.MatMul(queries, op.Transpose(rows, perm=[0, 2, 1]))  # (B, h, w, k)
    if equation == "bhwc,wkc->bhwk":
        queries, columns = tensors
        of_columns = op.MatMul(
            op.Transpose(queries, perm=[0, 2, 1, 3]), op.Transpose(columns, perm=[0, 2, 1])
        )
        return op.Transpose(of_columns, perm=[0, 2, 1, 3])  # (B, w, h, k) to (B, h, w, k)
    return op.Einsum(*tensors, equation=equation)


def check_tensors(model: ir.Model, spec: GraphSpec) -> None:
    """Raises ArtifactError unless names, dtypes and axes of the graph's tensors are those of
    `spec`, in order.
    """
    for kind, tensors, values in (
        ("inputs", spec.inputs, model.graph.inputs),
        ("outputs", spec.outputs, model.graph.outputs),
    ):
        wanted = [(tensor.name, tensor.dtype, _axes(tensor.shape, spec)) for tensor in tensors]
        found = [(value.name, _dtype(value), _axes(value.shape or (), spec)) for value in values]
        if wanted != found:
            raise ArtifactError(
                f"the exported {spec.name} has {kind} {found} where its spec says {wanted}: "
                "PyTorch's exporter has changed, or the module; versions that are known to work "
                "stand in constraints.txt"
            )


def _dtype(value: ir.Value) -> str:
    return "" if value.dtype is None else value.dtype.numpy().name


def _axes(shape: Any, spec: GraphSpec) -> tuple[int | str, ...]:
    """With an axis whose range is one number as that number."""
    fixed = {
        axis: allowed.min for axis, allowed in spec.ranges.items() if allowed.min == allowed.max
    }
    return tuple(
        axis if isinstance(axis, int) else fixed.get(str(axis), str(axis)) for axis in shape
    )
