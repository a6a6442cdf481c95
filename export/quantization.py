"""int8 or fp8 (E4M3) for linear layers, decided in the graph by pairs of QuantizeLinear and
DequantizeLinear (QDQ).

Symmetric throughout, as TensorRT wants it: one scale for what a layer reads, one for each output
channel of its weight. Everything else is not quantised: biases, results, attention, normalisation,
convolutions, and the token decoder's low-rank algebra. Nor is the head, which takes a small share
of the time, and whose rounding is the last before the scores. All that is in single precision for
a CPU, and in fp16 for a GPU, where TensorRT fuses no attention in single precision.

How a layer is quantised is searched for, by how much of its output survives on calibration inputs:
where to clip, and how much of the differences between channels to move into the weights
(SmoothQuant, arXiv 2211.10438), where a LayerNorm before it takes the inverse. A layer of which too
little survives stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxscript import ir

from regionspot.errors import InputError
from regionspot.export.onnx_files import save
from regionspot.export.onnx_passes import add_weight, constant, take_place
from regionspot.export.precision import to_half
from regionspot.export.quantization_search import (
    GRIDS,
    ROWS,
    CalibrationStats,
    FloatArray,
    Grid,
    Recipe,
    find_recipe,
)
from regionspot.runtime.formats import CPU, GPU
from regionspot.threads import default_threads

MIN_SQNR_DB = 20.0
"""A layer whose output would keep less is not quantised."""

UNQUANTIZED_MODULES = ("head",)
"""What is in these modules is not quantised."""

REST = {CPU: "fp32", GPU: "fp16"}
"""The precision of what is not quantised, by what the graph is laid out for."""

_SCALE_TYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}

_ROW_STEP = 3  # of a layer's input vectors every so many are looked at; a prompt has 7 tokens
_LOOKS = ("max", "min", "rows")
_MOVING = ("Transpose", "Reshape", "Pad", "Identity")


@dataclass(frozen=True)
class LayerReport:
    """Of the linear layers that read one tensor: how much of their outputs survives, in decibel."""

    names: tuple[str, ...]
    sqnr_db: float

    @property
    def quantized(self) -> bool:
        return self.sqnr_db >= MIN_SQNR_DB


@dataclass(frozen=True, eq=False)
class _Linears:
    """MatMul nodes that read the same value."""

    nodes: tuple[ir.Node, ...]

    @property
    def source(self) -> ir.Value:
        """What they read: another value once the layer before them is quantised."""
        value = self.nodes[0].inputs[0]
        assert value is not None
        return value

    @property
    def weights(self) -> FloatArray:
        """(K, N) of all nodes side by side."""
        return np.concatenate([_weight(node) for node in self.nodes], axis=1)


def quantize(
    onnx_path: str | Path,
    feeds: Sequence[Mapping[str, Any]],
    out: str | Path,
    rest: str = "fp32",
    precision: str = "int8",
    half_tensors: Collection[str] = (),
) -> tuple[LayerReport, ...]:
    """Write the int8 or fp8 version of a graph.

    Args:
        onnx_path: from `export_onnx`, in single precision.
        feeds: real inputs of the graph, see `regionspot.export.graph_inputs`.
        out: the file to write.
        rest: "fp32" or "fp16", the precision of all that is not quantised. Scales are numbers of
            that type too, so that no Cast stands between a layer and what is before and after it.
        precision: "int8" or "fp8".
        half_tensors: inputs and outputs that are in fp16, see `to_half`.

    Returns:
        What became of each linear layer. Of a graph without any, such as the token decoder's image
        part or the head, that is the graph in the precision `rest`.

    Raises:
        InputError: there is nothing to calibrate with.
    """
    if not feeds:
        raise InputError(
            f"{precision} needs inputs to calibrate with: name images of your own with "
            "--calibration"
        )
    grid = replace(GRIDS[precision], scale_type=_SCALE_TYPES[rest])
    model = ir.load(onnx_path)
    groups = find_linears(model.graph)
    observed = (
        observe(onnx_path, [str(group.source.name) for group in groups], feeds) if groups else {}
    )
    reports = []
    for group in groups:
        before = _smoothable(group)
        seen = observed[str(group.source.name)]
        recipe = find_recipe(seen, group.weights, before is not None, grid)
        report = LayerReport(tuple(str(node.name) for node in group.nodes), recipe.sqnr_db)
        if report.quantized:
            _apply(model.graph, group, recipe, before, grid)
        reports.append(report)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    if rest != "fp32":
        to_half(model, rest, half_tensors)
    done = sum(report.quantized for report in reports)
    model.metadata_props.update(
        {"precision": precision, "quantized_layers": f"{done} of {len(reports)}"}
    )
    save(model, out)
    return tuple(reports)


def find_linears(graph: ir.Graph) -> list[_Linears]:
    """Linear layers by what they read.

    Matrix products outside of any module of PyTorch's are the graph's own algebra, and not for
    int8; those in UNQUANTIZED_MODULES are left out too.
    """
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        scope = (node.name or "").rpartition("/")[0]
        if node.op_type != "MatMul" or not scope or scope.partition(".")[0] in UNQUANTIZED_MODULES:
            continue
        source, weight = node.inputs
        assert source is not None and weight is not None
        if constant(source) is None and (array := constant(weight)) is not None and array.ndim == 2:
            groups.setdefault(source, []).append(node)
    return [_Linears(tuple(nodes)) for nodes in groups.values()]


def observe(
    onnx_path: str | Path, names: Sequence[str], feeds: Sequence[Mapping[str, Any]]
) -> dict[str, CalibrationStats]:
    """Run a graph and look at some of its (..., K) values: only what is looked at is ever kept."""
    looks = [(name, kind) for name in names for kind in _LOOKS]
    seen: dict[tuple[str, str], list[FloatArray]] = {look: [] for look in looks}
    rng = np.random.default_rng(0)
    share = max(ROWS // len(feeds), 1)
    with TemporaryDirectory(prefix="regionspot-") as folder:
        session = _observing_session(onnx_path, names, Path(folder, "observed.onnx"))
        for feed in feeds:
            results = session.run([".".join(look) for look in looks], dict(feed))
            for (name, kind), found in zip(looks, results, strict=True):
                seen[name, kind].append(
                    found[rng.permutation(len(found))[:share]] if kind == "rows" else found
                )
    return {
        name: CalibrationStats(
            np.maximum(np.max(seen[name, "max"], 0), -np.min(seen[name, "min"], 0)),
            np.concatenate(seen[name, "rows"]),
        )
        for name in names
    }


def _observing_session(
    onnx_path: str | Path, names: Sequence[str], probed: Path
) -> ort.InferenceSession:
    """The graph with three more outputs for each value: each channel's largest and smallest, and
    every so many vectors.

    They are taken as soon as a value is there, so that calibration needs no more memory than
    running the graph.
    """
    model = ir.load(onnx_path)
    graph = model.graph
    values = {
        value.name: value
        for value in (*graph.inputs, *(value for node in graph for value in node.outputs))
    }
    step = [
        add_weight(graph, f"observe.{name}", np.array([number], np.int64))
        for name, number in (("start", 0), ("end", 2**62), ("axis", 0), ("step", _ROW_STEP))
    ]
    for name in names:
        value = values[name]
        rank, channels = len(_shape(value)), _shape(value)[-1]
        axes = add_weight(graph, f"{name}.axes", np.arange(rank - 1, dtype=np.int64))
        flat = add_weight(graph, f"{name}.flat", np.array([-1, channels], np.int64))
        largest = ir.node("ReduceMax", [value, axes], {"keepdims": 0})
        smallest = ir.node("ReduceMin", [value, axes], {"keepdims": 0})
        vectors = ir.node("Reshape", [value, flat])
        rows = ir.node("Slice", [vectors.outputs[0], *step])
        graph.insert_before(
            next(usage.node for usage in value.uses()), [largest, smallest, vectors, rows]
        )
        for node, kind in zip((largest, smallest, rows), _LOOKS, strict=True):
            node.outputs[0].name, node.outputs[0].dtype = f"{name}.{kind}", ir.DataType.FLOAT
            graph.outputs.append(node.outputs[0])
    ir.passes.common.TopologicalSortPass()(model)
    ir.save(model, probed, external_data=f"{probed.name}.data")
    options = ort.SessionOptions()
    options.intra_op_num_threads = default_threads()
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    return ort.InferenceSession(probed, options, providers=["CPUExecutionProvider"])


def _weight(node: ir.Node) -> FloatArray:
    """(K, N)."""
    value = node.inputs[1]
    array = constant(value) if value is not None else None
    assert array is not None
    return array


def _shape(value: ir.Value) -> tuple[Any, ...]:
    assert value.shape is not None
    return tuple(value.shape)


def _smoothable(group: _Linears) -> ir.Node | None:
    """The LayerNorm whose result these layers read, moved about at most, and nothing else reads;
    None without one.
    """
    value, readers = group.source, set(group.nodes)
    channels = _shape(value)[-1]
    while True:
        if {usage.node for usage in value.uses()} != readers or _shape(value)[-1] != channels:
            return None
        node = value.producer()
        if node is None or node.op_type == "LayerNormalization":
            return node
        if node.op_type not in _MOVING or not _keeps_channels(node) or node.inputs[0] is None:
            return None
        value, readers = node.inputs[0], {node}


def _keeps_channels(node: ir.Node) -> bool:
    if node.op_type != "Transpose":
        # a Reshape to as many channels cuts elsewhere; a Pad that adds some changes their number
        return True
    order = node.attributes["perm"].as_ints()
    return order[-1] == len(order) - 1


def _apply(
    graph: ir.Graph, group: _Linears, recipe: Recipe, before: ir.Node | None, grid: Grid
) -> None:
    """Put the pairs in, and the smoothing into the LayerNorm `before`."""
    if before is not None and not (recipe.smoothing == 1).all():
        for index in (1, 2)[: len(before.inputs) - 1]:
            old = before.inputs[index]
            array = constant(old) if old is not None else None
            assert array is not None
            smoothed = add_weight(
                graph, f"{before.name}.{index}.smoothed", array / recipe.smoothing
            )
            before.replace_input_with(index, smoothed)
        _rename_smoothed(group.source, before)
    name = str(group.source.name)
    scale = add_weight(graph, f"{name}.scale", np.array(recipe.scale, np.float32))
    zero = add_weight(graph, f"{name}.zero_point", np.zeros((), grid.dtype))
    assert zero.dtype is not None
    rounded = _node("QuantizeLinear", [group.source, scale, zero], name, zero.dtype)
    restored = _node("DequantizeLinear", [rounded.outputs[0], scale, zero], name, ir.DataType.FLOAT)
    weight = _quantized_weight(graph, group, recipe.smoothing, grid)
    graph.insert_before(
        group.nodes[0], [rounded, restored, weight, *_products(graph, group, restored, weight)]
    )
    for node in group.nodes:
        graph.remove(node, safe=True)


def _rename_smoothed(value: ir.Value, before: ir.Node) -> None:
    """Names of values are the same in all precisions of a graph where their values are; these were
    divided by the smoothing.
    """
    while value.producer() is not before:
        value.name = f"{value.name}.smoothed"
        producer = value.producer()
        assert producer is not None and producer.inputs[0] is not None
        value = producer.inputs[0]
    value.name = f"{value.name}.smoothed"


def _quantized_weight(
    graph: ir.Graph, group: _Linears, smoothing: FloatArray, grid: Grid
) -> ir.Node:
    """A DequantizeLinear of the group's weights, rounded, with a scale for each output channel."""
    weights = group.weights * smoothing[:, None]  # (K, N)
    scales = grid.channel_scales(weights)  # (1, N)
    name = f"{group.nodes[0].name}.weight"
    inputs = [
        add_weight(graph, f"{name}.quantized", grid.rounded(weights, scales).astype(grid.dtype)),
        add_weight(graph, f"{name}.scale", scales[0]),
        add_weight(graph, f"{name}.zero_point", np.zeros(scales.shape[1], grid.dtype)),
    ]
    return _node("DequantizeLinear", inputs, name, ir.DataType.FLOAT, axis=1)


def _products(
    graph: ir.Graph, group: _Linears, restored: ir.Node, weight: ir.Node
) -> list[ir.Node]:
    """One product in place of all of the group's: ONNX Runtime has no int8 for several that share
    an input.
    """
    first = group.nodes[0]
    product = ir.node("MatMul", [restored.outputs[0], weight.outputs[0]], name=first.name)
    (result,) = product.outputs
    result.name, result.type = f"{first.name}.all:0", ir.TensorType(ir.DataType.FLOAT)
    result.shape = ir.Shape([*_shape(group.source)[:-1], group.weights.shape[1]])
    if len(group.nodes) == 1:
        take_place(first.outputs[0], result)
        return [product]
    widths = add_weight(
        graph,
        f"{first.name}.widths",
        np.array([_weight(n).shape[1] for n in group.nodes], np.int64),
    )
    split = ir.node(
        "Split",
        [result, widths],
        {"axis": -1},
        num_outputs=len(group.nodes),
        name=f"{first.name}/Split",
    )
    for node, part in zip(group.nodes, split.outputs, strict=True):
        part.shape = node.outputs[0].shape
        part.type = node.outputs[0].type
        take_place(node.outputs[0], part)
    return [product, split]


def _node(
    kind: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType, **attributes: int
) -> ir.Node:
    """A node whose result is as large as its first input."""
    node = ir.node(kind, inputs, attributes, name=f"{name}/{kind}")
    (output,) = node.outputs
    output.name, output.shape, output.type = f"{node.name}:0", inputs[0].shape, ir.TensorType(dtype)
    return node
