"""What is done to a graph between PyTorch's exporter and the file: folded, made uniform, named."""

from __future__ import annotations

import ast
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx.reference import ReferenceEvaluator
from onnxscript import ir
from onnxscript.optimizer import optimize

_SCOPES = "pkg.torch.onnx.name_scopes"
_REARRANGING = {
    "Split",
    "Slice",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Gather",
    "Identity",
    "Cast",
}
_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def simplify(model: ir.Model) -> None:
    """Fold what depends on weights alone, drop what is not used, and keep each weight once."""
    lift_constants = ir.passes.common.LiftConstantsToInitializersPass(
        lift_all_constants=True, size_limit=0
    )
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
    """Replace nodes that only rearrange weights by their results, however large: fused projections
    are split, say.
    """
    for node in list(graph):
        arrays = {value.name or "": constant(value) for value in node.inputs if value is not None}
        if node.op_type not in _REARRANGING or any(array is None for array in arrays.values()):
            continue
        results = ReferenceEvaluator(ir.to_proto(node)).run(None, arrays)
        for output, array in zip(node.outputs, results, strict=True):
            output.replace_all_uses_with(
                add_weight(graph, _folded_name(node, output, graph), array)
            )
        graph.remove(node, safe=True)


def split_gemms(graph: ir.Graph) -> None:
    """MatMul and Add in place of Gemm, as all other linear layers stand here.

    `nn.MultiheadAttention` flattens what its last Gemm reads and gives the result its shape back;
    both in one Reshape before it, since ONNX Runtime would make a Gemm of a MatMul of matrices
    again, which has no int8 kernel.
    """
    for node in list(graph):
        settings = _PLAIN_GEMM | {
            name: attribute.value for name, attribute in node.attributes.items()
        }
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
        if (
            _is_reshape(before)
            and _is_reshape(after)
            and array.shape[0] == array.shape[1]
            and after is not None
        ):
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
    """Let all that read `old` read `new`, which takes the name too."""
    name = old.name
    old.name = f"{name}.replaced"
    new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [usage.node for usage in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _is_reshape(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Reshape"


def constant(value: ir.Value) -> npt.NDArray[Any] | None:
    """The array behind a weight, None where a value is computed."""
    return (
        value.const_value.numpy()
        if value.is_initializer() and value.const_value is not None
        else None
    )


def add_weight(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new weight of the graph."""
    tensor = ir.tensor(np.array(array, order="C"), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _folded_name(node: ir.Node, output: ir.Value, graph: ir.Graph) -> str:
    """After the weight that it was made of, so that messages about it make sense."""
    kind = (
        node.op_type.lower()
        if len(node.outputs) == 1
        else f"{node.op_type.lower()}{output.index()}"
    )
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
