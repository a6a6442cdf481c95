"""PyTorch graphs to ONNX files: traced with dynamic axes, folded, named after the spec, checked."""

from __future__ import annotations

import ast
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnxscript import ir
from onnxscript import opset20 as op
from onnxscript.optimizer import optimize
from torch import nn

from regionspot.errors import ArtifactError
from regionspot.modeling.graphs import graph_module
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.graph_spec import GraphSpec, Range

OPSET = 20
MAX_FILE_BYTES = 2_000_000_000
"""Larger graphs keep their weights in a file beside them: protobuf ends at 2 GiB."""

MASKED_SCORE = -30_000.0
"""An attention score that is as good as minus infinity, within half precision and without its NaN."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_REARRANGING = {"Split", "Slice", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Gather", "Identity", "Cast"}
_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}
_DTYPES = {dtype: getattr(torch, dtype) for dtype in ("uint8", "int32", "float32", "bool")}


def export_onnx(
    model: RegionSpot, spec: GraphSpec, path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one graph of a model as ONNX in single precision.

    Tensors are called and ordered as in `spec`, with its dynamic axes; nodes after the modules they come from, such as
    `sam.image_encoder.blocks.0.attn.qkv/MatMul`, which is what `regionspot.export.precision` goes by. Beyond 2 GB the
    weights lie beside it in `path` + ".data".

    Args:
        spec: one of `graph_specs(model_info(model))`.
        path: of the `.onnx` file. It appears whole or not at all.
        metadata: more entries for the file's metadata.

    Raises:
        ArtifactError: what came out is not what `spec` says, or not valid ONNX.
    """
    with _exporting():
        graph_model = trace(graph_module(model, spec.name), spec, model.device)
        simplify(graph_model)
    name_nodes(graph_model.graph)
    graph_model.graph.name = spec.name
    check_tensors(graph_model, spec)
    graph_model.metadata_props.update(
        {"graph": spec.name, "model": model.name, "precision": "fp32", **(metadata or {})}
    )
    save(graph_model, path)


def trace(module: nn.Module, spec: GraphSpec, device: torch.device) -> ir.Model:
    """The module as the exporter gives it, neither folded nor optimised."""
    sizes = tracing_sizes(spec.ranges)
    arguments = tuple(
        torch.ones(tensor.resolved(sizes), dtype=_DTYPES[tensor.dtype], device=device) for tensor in spec.inputs
    )
    dims: dict[int | str, torch.export.Dim] = {
        axis: torch.export.Dim(axis, min=allowed.min, max=allowed.max)
        for axis, allowed in spec.ranges.items()
        if allowed.min < allowed.max
    }
    dynamic_shapes = tuple(
        {i: dims[axis] for i, axis in enumerate(tensor.shape) if axis in dims} for tensor in spec.inputs
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
    """A size for each axis to trace with: within its range, no two alike, and not 1, which PyTorch takes for fixed.

    Where a range leaves no choice, two axes may be alike.
    """
    sizes: dict[str, int] = {}
    for axis, allowed in sorted(ranges.items(), key=lambda item: item[1].max):
        candidates = range(min(max(allowed.min, 2), allowed.max), allowed.max + 1)
        sizes[axis] = next((size for size in candidates if size not in sizes.values()), candidates[0])
    return sizes


@contextmanager
def _exporting() -> Iterator[None]:
    """Without gradients, without `nn.MultiheadAttention`'s fused kernel, which has no ONNX form, and in silence."""
    fast_path, logger = torch.backends.mha.get_fastpath_enabled(), logging.getLogger("onnxscript")
    level = logger.level
    torch.backends.mha.set_fastpath_enabled(False)
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
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

    The exporter's own adds a dozen nodes to transpose the keys and guards against rows that see nothing, of which there
    are none here: `regionspot.modeling.head.attendable` and causal masks leave each query something.
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
        of_columns = op.MatMul(op.Transpose(queries, perm=[0, 2, 1, 3]), op.Transpose(columns, perm=[0, 2, 1]))
        return op.Transpose(of_columns, perm=[0, 2, 1, 3])  # (B, w, h, k) to (B, h, w, k)
    return op.Einsum(*tensors, equation=equation)


def simplify(model: ir.Model) -> None:
    """Fold what depends on weights alone, drop what is not used, and keep each weight once."""
    lift_constants = ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    lift_constants(model)
    fold_rearranged_weights(model.graph)
    optimize(model)
    lift_constants(model)
    fold_rearranged_weights(model.graph)
    split_gemms(model.graph)
    for step in (
        ir.passes.common.CommonSubexpressionEliminationPass(),
        ir.passes.common.DeduplicateInitializersPass(size_limit=1 << 40),
        ir.passes.common.RemoveUnusedNodesPass(),
        ir.passes.common.TopologicalSortPass(),
    ):
        step(model)


def fold_rearranged_weights(graph: ir.Graph) -> None:
    """Replace nodes that only rearrange weights by their results, however large: fused projections are split, say."""
    for node in list(graph):
        arrays = {value.name or "": constant(value) for value in node.inputs if value is not None}
        if node.op_type not in _REARRANGING or any(array is None for array in arrays.values()):
            continue
        results = ReferenceEvaluator(ir.to_proto(node)).run(None, arrays)
        for output, array in zip(node.outputs, results, strict=True):
            output.replace_all_uses_with(add_weight(graph, _folded_name(node, output, graph), array))
        graph.remove(node, safe=True)


def split_gemms(graph: ir.Graph) -> None:
    """MatMul and Add in place of Gemm, as all other linear layers stand here.

    `nn.MultiheadAttention` flattens what its last Gemm reads and gives the result its shape back; both in one Reshape
    before it, since ONNX Runtime would make a Gemm of a MatMul of matrices again, which has no int8 kernel.
    """
    for node in list(graph):
        settings = _PLAIN_GEMM | {name: attribute.value for name, attribute in node.attributes.items()}
        transposed = bool(settings.pop("transB", 0))
        if node.op_type != "Gemm" or settings != _PLAIN_GEMM:
            continue
        source, weight, bias = (*node.inputs, None)[:3]
        assert source is not None and weight is not None
        array = constant(weight)
        if array is None:
            continue
        if transposed:
            weight = add_weight(graph, f"{weight.name}.transpose", array.T)
        result = node.outputs[0]
        before, after = source.producer(), _only_reader(result)
        new = []
        if _is_reshape(before) and _is_reshape(after) and array.shape[0] == array.shape[1] and after is not None:
            result = after.outputs[0]
            new.append(ir.node("Reshape", [before.inputs[0], after.inputs[1]]))  # type: ignore[union-attr]
            source = new[0].outputs[0]
        new.append(ir.node("MatMul", [source, weight]))
        if bias is not None:
            new.append(ir.node("Add", [new[-1].outputs[0], bias]))
        for one in new:
            one.metadata_props.update(node.metadata_props)
            one.outputs[0].shape, one.outputs[0].type = result.shape, result.type
        graph.insert_before(node, new)
        take_place(result, new[-1].outputs[0])


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Let all that read `old` read `new`; as an output of the graph it takes the name too."""
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.replaced", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [usage.node for usage in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _is_reshape(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Reshape"


def constant(value: ir.Value) -> npt.NDArray[Any] | None:
    """The array behind a weight, None where a value is computed."""
    return value.const_value.numpy() if value.is_initializer() and value.const_value is not None else None


def add_weight(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new weight of the graph."""
    tensor = ir.tensor(np.array(array, order="C"), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _folded_name(node: ir.Node, output: ir.Value, graph: ir.Graph) -> str:
    """After the weight that it was made of, so that messages about it make sense."""
    kind = node.op_type.lower() if len(node.outputs) == 1 else f"{node.op_type.lower()}{output.index()}"
    name = f"{node.inputs[0].name}.{kind}" if node.inputs[0] is not None else kind
    return name if name not in graph.initializers else f"{name}.{output.name}"


def name_nodes(graph: ir.Graph) -> None:
    """Call every node after the module that it comes from, and its results after the node.

    What else the exporter notes down, source files and stack traces, goes.
    """
    counts: Counter[str] = Counter()
    outputs = set(graph.outputs)
    for node in graph:
        scope = ast.literal_eval(node.metadata_props.get(_SCOPES, "['', '']"))[-2]
        stem = f"{'' if scope.startswith('_') else scope}/{node.op_type}"
        counts[stem] += 1
        node.name = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
        node.metadata_props.clear()
        node.doc_string = None
        for index, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if value not in outputs:
                value.name = f"{node.name}:{index}"
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()


def check_tensors(model: ir.Model, spec: GraphSpec) -> None:
    """Raises ArtifactError unless names, dtypes and axes of the graph's tensors are those of `spec`, in order."""
    for kind, tensors, values in (
        ("inputs", spec.inputs, model.graph.inputs),
        ("outputs", spec.outputs, model.graph.outputs),
    ):
        wanted = [(tensor.name, tensor.dtype, _axes(tensor.shape, spec)) for tensor in tensors]
        found = [(value.name, _dtype(value), _axes(value.shape or (), spec)) for value in values]
        if wanted != found:
            raise ArtifactError(
                f"the exported {spec.name} has {kind} {found} where its spec says {wanted}: PyTorch's exporter has "
                "changed, or the module; versions that are known to work stand in constraints.txt"
            )


def _dtype(value: ir.Value) -> str:
    return "" if value.dtype is None else value.dtype.numpy().name


def _axes(shape: Any, spec: GraphSpec) -> tuple[int | str, ...]:
    """With an axis whose range is one number as that number."""
    fixed = {axis: allowed.min for axis, allowed in spec.ranges.items() if allowed.min == allowed.max}
    return tuple(axis if isinstance(axis, int) else fixed.get(str(axis), str(axis)) for axis in shape)


def save(model: ir.Model, path: str | Path) -> None:
    """Write a model, checked by ONNX's own checker before the file appears under its name.

    Raises:
        ArtifactError: not valid ONNX, or it cannot be written.
    """
    path = Path(path)
    weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if weight_bytes > MAX_FILE_BYTES else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
            ir.save(model, Path(aside, path.name), external_data=external)
            onnx.checker.check_model(str(Path(aside, path.name)), full_check=True)
            for file in sorted(os.listdir(aside), reverse=True):  # the weights first, then the graph that names them
                shutil.move(Path(aside, file), path.with_name(file))
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"{path.name} is not valid ONNX ({error}): please report this") from error
