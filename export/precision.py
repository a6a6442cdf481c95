"""Half precision decided in the graph, node by node: what strongly typed runtimes (TensorRT 11)
want to be told.

Sums of many products (matrix products, convolutions) run in half precision, as does what lies
between them. What loses by it stays in single precision: normalisations, softmax, reductions,
powers and quotients; the token decoder's variance, a sum with cancellation; and the phase of sines,
where half precision would move a box by pixels. The graph's own inputs and outputs keep their
types, unless they are named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnxscript import ir

from regionspot.errors import ArtifactError, InputError
from regionspot.export.onnx_files import save
from regionspot.export.onnx_passes import add_weight, constant

HALF_TYPES = {
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}

MIN_OPSET = {"fp16": 13, "bf16": 22}
"""Opset 22 lets Conv and others take bf16, and changes nothing else of what stands in these
graphs.
"""

HALF_OPS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
SINGLE_OPS = frozenset(
    {
        "LayerNormalization",
        "Softmax",
        "LogSoftmax",
        "Pow",
        "Sqrt",
        "Exp",
        "Log",
        "Div",
        "Reciprocal",
        "Sin",
        "Cos",
    }
    | {f"Reduce{kind}" for kind in ("Mean", "Sum", "SumSquare", "L1", "L2", "LogSumExp", "Prod")}
)
"""All others do as the nodes before them: half precision if anything that they work on is."""

WITHOUT_KERNEL = frozenset({("ConvTranspose", "bf16")})
"""What TensorRT-RTX 1.7 cannot run, which therefore stays in single precision."""

SINGLE_SCOPES = ("variance",)
"""Modules with these words in their names stay in single precision, with all that is in them."""

_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def write_half(
    onnx_path: str | Path, out: str | Path, precision: str, half_tensors: Collection[str] = ()
) -> None:
    """Convert a file of `export_onnx`; see `to_half`."""
    model = ir.load(onnx_path)
    to_half(model, precision, half_tensors)
    model.metadata_props["precision"] = precision
    save(model, out)


def to_half(model: ir.Model, precision: str, half_tensors: Collection[str] = ()) -> None:
    """Convert a graph in single precision in place.

    Args:
        model: with node names as `export_onnx` gives them.
        precision: "fp16" or "bf16".
        half_tensors: inputs and outputs that are in half precision too.

    Raises:
        InputError: another precision.
        ArtifactError: a weight does not fit into fp16, or the graph has branches or loops.
    """
    if precision not in HALF_TYPES:
        raise InputError(
            f"{precision!r} is not a half precision: choose one of {', '.join(HALF_TYPES)}"
        )
    ir.passes.common.ShapeInferencePass()(model)
    conversion = _Conversion(model.graph, precision)
    for value in model.graph.inputs:
        if value.name in half_tensors:
            value.dtype = conversion.half
    for node in list(model.graph):
        conversion.convert(node)
    for index, value in enumerate(model.graph.outputs):
        wanted = conversion.half if value.name in half_tensors else ir.DataType.FLOAT
        conversion.settle_output(index, wanted)
    model.opset_imports[""] = max(model.opset_imports[""], MIN_OPSET[precision])
    ir.passes.common.RemoveUnusedNodesPass()(model)


class _Conversion:
    """Of one graph. A value's dtype tells what has become of it."""

    def __init__(self, graph: ir.Graph, precision: str) -> None:
        self.graph = graph
        self.precision = precision
        self.half, self.numpy_half = HALF_TYPES[precision]
        self.phases = _ancestors(node for node in graph if node.op_type in ("Sin", "Cos"))
        self.converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def convert(self, node: ir.Node) -> None:
        """Settle the node's precision, and have its inputs in that precision."""
        if any(attribute.type in _SUBGRAPHS for attribute in node.attributes.values()):
            raise ArtifactError(
                f"{node.name} is a branch or a loop, which cannot be converted to {self.precision}"
            )
        floats = [
            (i, value)
            for i, value in enumerate(node.inputs)
            if value is not None and self._is_float(value)
        ]
        wanted = (
            self.half
            if self._wants_half(node, [value for _, value in floats])
            else ir.DataType.FLOAT
        )
        for index, value in floats:
            if value.dtype != wanted:
                node.replace_input_with(index, self._in_type(value, wanted, node))
        for output in node.outputs:
            if floats and self._is_float(output):
                output.dtype = wanted

    def settle_output(self, index: int, wanted: ir.DataType) -> None:
        """Give a graph output of floating-point numbers the type that is wanted, under its name."""
        value = self.graph.outputs[index]
        if self._is_float(value) and value.dtype != wanted:
            suffix = self.precision if value.dtype == self.half else "fp32"
            name, value.name = str(value.name), f"{value.name}.{suffix}"
            cast = _cast(value, wanted, name)
            self.graph.append(cast)
            self.graph.outputs[index] = cast.outputs[0]

    def _wants_half(self, node: ir.Node, floats: list[ir.Value]) -> bool:
        if node in self.phases or node.op_type in SINGLE_OPS or _in_single_scope(node):
            return False
        if (node.op_type, self.precision) in WITHOUT_KERNEL:
            return False
        if node.op_type in HALF_OPS:
            return True
        activations = [value for value in floats if not value.is_initializer()]
        return any(value.dtype == self.half for value in activations) or (
            bool(floats) and not activations
        )

    def _in_type(self, value: ir.Value, dtype: ir.DataType, node: ir.Node) -> ir.Value:
        """The value in another type: a weight of that type, or the result of one Cast for all who
        want it.
        """
        if (value, dtype) not in self.converted:
            array = constant(value)
            if array is not None:
                self.converted[value, dtype] = self._half_weight(str(value.name), array)
            else:
                cast = _cast(value, dtype, f"{value.name}.{dtype.name.lower()}")
                self.graph.insert_before(node, cast)
                self.converted[value, dtype] = cast.outputs[0]
        return self.converted[value, dtype]

    def _half_weight(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        with np.errstate(over="ignore"):
            half = array.astype(self.numpy_half)
        if np.isinf(half.astype(np.float32)).sum() > np.isinf(array).sum():
            largest = np.abs(array[np.isfinite(array)]).max()
            raise ArtifactError(
                f"weight {name} reaches {largest:.4g}, more than {self.precision} can hold: use "
                "bf16, which has the range of single precision"
            )
        return add_weight(self.graph, f"{name}.{self.precision}", half)

    def _is_float(self, value: ir.Value) -> bool:
        return value.dtype in (ir.DataType.FLOAT, self.half)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype}, name=f"{name}/Cast")
    (result,) = node.outputs
    result.name, result.shape, result.type = name, value.shape, ir.TensorType(dtype)
    return node


def _ancestors(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """The nodes and all that they are computed from."""
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            producers = (value.producer() for value in node.inputs if value is not None)
            waiting += [producer for producer in producers if producer is not None]
    return found


def _in_single_scope(node: ir.Node) -> bool:
    scope = (node.name or "").rpartition("/")[0]
    return any(part in scope for part in SINGLE_SCOPES)
