"""Half precision in the graph: which node works in which type, no Cast too many, weights that do
not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from regionspot.errors import ArtifactError, InputError
from regionspot.export.graph_inputs import GraphInputs
from regionspot.export.precision import HALF_OPS, SINGLE_OPS, WITHOUT_KERNEL, to_half, write_half
from regionspot.modeling.graphs import graph_module
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.graphs import GRAPHS
from regionspot.runtime.openvino_runner import OpenVinoRunner
from regionspot.runtime.ort_runner import OrtRunner
from regionspot.runtime.runner import Runner
from regionspot.runtime.tolerance import HALF, measure
from regionspot.runtime.torch_runner import TorchRunner

HALF_TYPE = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
SINGLE, FP16 = TensorProto.FLOAT, TensorProto.FLOAT16


def graph_of(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",)
) -> ir.Model:
    """From "x" (B, 4) and "i" (B,) int64."""
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info("x", SINGLE, ["B", 4]),
            helper.make_tensor_value_info("i", TensorProto.INT64, ["B"]),
        ],
        [helper.make_tensor_value_info("y", SINGLE, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def converted(
    model: ir.Model, precision: str = "fp16", half_tensors: Sequence[str] = ()
) -> onnx.ModelProto:
    """Checked by ONNX, which finds every operator whose inputs are of two types."""
    to_half(model, precision, half_tensors)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Of every tensor, by name."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        weight.name: weight.data_type for weight in inferred.initializer
    }


def types_by_node(model: onnx.ModelProto) -> dict[str, int]:
    """Of every node's first result."""
    of = types(model)
    return {node.name: of[node.output[0]] for node in model.graph.node}


W, B, EPS = np.eye(4, dtype=np.float32), np.ones(4, np.float32), np.array(1e-6, np.float32)


def test_products_and_what_follows_are_half_and_norms_single() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "m/MatMul"),
        helper.make_node("Add", ["a", "b"], ["c"], "m/Add"),
        helper.make_node("Gelu", ["c"], ["d"], "m/Gelu"),
        helper.make_node("LayerNormalization", ["d", "b", "b2"], ["e"], "n/LayerNormalization"),
        helper.make_node("Add", ["c", "e"], ["f"], "r/Add"),
        helper.make_node("Softmax", ["f"], ["g"], "s/Softmax"),
        helper.make_node("MatMul", ["g", "w"], ["h"], "m/MatMul_2"),
        helper.make_node("Sub", ["x", "b"], ["k"], "first/Sub"),
        helper.make_node("Add", ["h", "k"], ["y"], "last/Add"),
    ]
    proto = converted(graph_of(nodes, {"w": W, "b": B, "b2": 2 * B}))
    found = types_by_node(proto)
    assert [
        found[name] for name in ("m/MatMul", "m/Add", "m/Gelu", "r/Add", "m/MatMul_2", "last/Add")
    ] == [FP16] * 6
    assert [found[name] for name in ("n/LayerNormalization", "s/Softmax", "first/Sub")] == [
        SINGLE
    ] * 3
    of = types(proto)
    assert of["x"] == of["y"] == SINGLE
    assert of["w.fp16"] == FP16 and "w" not in of  # once, in half precision
    assert of["b"] == SINGLE and of["b.fp16"] == FP16  # the norm's, and the sums'
    casts = [node for node in proto.graph.node if node.op_type == "Cast"]
    assert len({(cast.input[0], cast.attribute[0].i) for cast in casts}) == len(casts) == 7


def test_inputs_and_outputs_in_half_precision_where_they_are_named() -> None:
    """Without a Cast where half precision goes in, or comes out; with one where the last node stays
    in single precision.
    """
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "m/MatMul"),
        helper.make_node("Add", ["a", "b"], ["y"], "m/Add"),
    ]
    proto = converted(graph_of(nodes, {"w": W, "b": B}), half_tensors=("x", "y"))
    of = types(proto)
    assert of["x"] == of["y"] == FP16
    assert [node.op_type for node in proto.graph.node] == ["MatMul", "Add"]
    nodes[1] = helper.make_node("LayerNormalization", ["a", "b", "b2"], ["y"], "n/Norm")
    proto = converted(graph_of(nodes, {"w": W, "b": B, "b2": B}), half_tensors=("y",))
    of = types(proto)
    assert of["x"] == of["y.fp32"] == SINGLE and of["y"] == FP16
    assert types_by_node(proto)["n/Norm"] == SINGLE


def test_phases_of_sines_stay_single() -> None:
    """In half precision a position of 1000 is a multiple of one half, and its sine that of another
    place.
    """
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "pe/MatMul"),
        helper.make_node("Sin", ["a"], ["s"], "pe/Sin"),
        helper.make_node("Cos", ["a"], ["c"], "pe/Cos"),
        helper.make_node("Concat", ["s", "c"], ["sc"], "pe/Concat", axis=-1),
        helper.make_node("MatMul", ["sc", "w2"], ["y"], "m/MatMul"),
    ]
    found = types_by_node(converted(graph_of(nodes, {"w": W, "w2": np.ones((8, 3), np.float32)})))
    assert [found[f"pe/{kind}"] for kind in ("MatMul", "Sin", "Cos", "Concat")] == [SINGLE] * 4
    assert found["m/MatMul"] == FP16


def test_variance_modules_stay_single() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "decoder/MatMul"),
        helper.make_node("MatMul", ["a", "w"], ["b"], "decoder.variance1/MatMul"),
        helper.make_node("Add", ["b", "eps"], ["c"], "decoder.variance1/Add"),
        helper.make_node("Mul", ["a", "c"], ["y"], "decoder/Mul"),
    ]
    proto = converted(graph_of(nodes, {"w": W, "eps": EPS}))
    found = types_by_node(proto)
    assert found["decoder.variance1/MatMul"] == found["decoder.variance1/Add"] == SINGLE
    assert found["decoder/MatMul"] == found["decoder/Mul"] == FP16
    assert types(proto)["w"] == SINGLE  # the same weight, whole where it counts


def test_tables_are_stored_in_half_and_indices_left_alone() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "i"], ["a"], "embedding/Gather"),
        helper.make_node("Shape", ["a"], ["s"], "embedding/Shape"),
        helper.make_node("Reshape", ["a", "s"], ["b"], "embedding/Reshape"),
        helper.make_node("Where", ["keep", "b", "low"], ["y"], "embedding/Where"),
    ]
    weights = {
        "table": W,
        "keep": np.array([True, False, True, True]),
        "low": np.array(-np.inf, np.float32),
    }
    proto = converted(graph_of(nodes, weights))
    of = types(proto)
    assert of["table.fp16"] == of["low.fp16"] == FP16 and "table" not in of
    assert of["keep"] == TensorProto.BOOL and of["i"] == of["s"] == TensorProto.INT64


def test_weights_that_do_not_fit() -> None:
    nodes = [helper.make_node("MatMul", ["x", "big.weight"], ["y"], "m/MatMul")]
    weights = {"big.weight": 7e4 * W}
    with pytest.raises(ArtifactError, match=r"weight big\.weight reaches 7e\+04.*use bf16"):
        to_half(graph_of(nodes, weights), "fp16")
    model = ir.from_proto(converted(graph_of(nodes, weights), "bf16"))
    stored = model.graph.initializers["big.weight.bf16"].const_value
    assert stored is not None and stored.dtype == ir.DataType.BFLOAT16
    np.testing.assert_array_equal(stored.numpy(), (7e4 * W).astype(ml_dtypes.bfloat16))


def test_what_cannot_be_converted() -> None:
    with pytest.raises(InputError, match="'fp8' is not a half precision"):
        to_half(graph_of([helper.make_node("Relu", ["x"], ["y"], "m/Relu")], {}), "fp8")
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])],
        "branch",
        [],
        [helper.make_tensor_value_info("r", SINGLE, None)],
    )
    node = helper.make_node("If", ["yes"], ["y"], "m/If", then_branch=branch, else_branch=branch)
    with pytest.raises(ArtifactError, match="m/If is a branch or a loop"):
        to_half(graph_of([node], {"yes": np.array(True)}), "fp16")


@pytest.mark.parametrize("precision", HALF_TYPE)
@pytest.mark.parametrize("graph", [name for name in GRAPHS if name != "region_recognizer"])
def test_graphs(
    mini: RegionSpot,
    specs: dict[str, GraphSpec],
    graph_inputs: GraphInputs,
    exported: Callable[[str], Path],
    tmp_path: Path,
    graph: str,
    precision: str,
) -> None:
    path = tmp_path / "half.onnx"
    write_half(exported(graph), path, precision)
    check_types(onnx.load(path), precision)
    if graph != "sam_mask_prompt":  # a few thousand weights: its file is mostly names
        assert path.stat().st_size < 0.65 * exported(graph).stat().st_size
    spec = specs[graph]
    feeds = [graph_inputs.seeded(spec), *graph_inputs.real(spec, 2)]
    with TorchRunner(graph_module(mini, graph), spec) as reference:
        expected = [reference.infer(feed) for feed in feeds]
    runner: Runner = OpenVinoRunner(path, spec, threads=1)  # the one that has bf16 on a CPU
    check(runner, feeds, expected)
    if precision == "fp16":
        check(OrtRunner(path, spec, threads=1, precision=precision), feeds, expected)


def check_types(model: onnx.ModelProto, precision: str) -> None:
    half, of = HALF_TYPE[precision], types(model)
    producers = {output: node for node in model.graph.node for output in node.output}
    sines = [producers[node.input[0]] for node in model.graph.node if node.op_type == "Sin"]
    # the one MatMul of coordinates, and then by 2 pi
    phases = {producers[node.input[0]].name for node in sines}
    for node in model.graph.node:
        floats = {of[name] for name in node.input if of.get(name) in (SINGLE, half)}
        if node.op_type == "Cast":
            source = producers.get(node.input[0])
            assert (
                source is None
                or source.op_type != "Cast"
                or of[source.input[0]] not in (SINGLE, half)
            ), node.name
        elif (
            node.op_type in SINGLE_OPS
            or (node.op_type, precision) in WITHOUT_KERNEL
            or "variance" in node.name
        ):
            assert floats <= {SINGLE}, node.name
        elif node.op_type in HALF_OPS and node.name not in phases:
            assert floats == {half}, node.name
        else:
            assert len(floats) <= 1, node.name
    repeated = Counter(
        (node.input[0], node.attribute[0].i) for node in model.graph.node if node.op_type == "Cast"
    )
    assert max(repeated.values()) == 1
    weights = {weight.name: weight for weight in model.graph.initializer}
    for name, weight in weights.items():
        if (
            name.removesuffix(f".{precision}") != name
            and name.removesuffix(f".{precision}") in weights
        ):
            assert np.prod(weight.dims) < 2**17, name  # only small ones are there in both types


def check(
    runner: Runner, feeds: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]
) -> None:
    with runner:
        for feed, wanted in zip(feeds, expected, strict=True):
            for name, array in runner.infer(feed).items():
                assert array.dtype == np.float32
                assert not HALF.breaches(measure(wanted[name], array)), name
