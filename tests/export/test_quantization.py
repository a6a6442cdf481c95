"""int8: symmetric pairs around linear layers alone, outliers smoothed away, sensitive layers left,
int8 kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

from regionspot.errors import InputError
from regionspot.export import quantization, quantization_search
from regionspot.export.graph_inputs import GraphInputs
from regionspot.export.quantization import LayerReport, quantize
from regionspot.modeling.graphs import graph_module
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.graphs import GRAPHS
from regionspot.runtime.openvino_runner import OpenVinoRunner
from regionspot.runtime.ort_runner import EXACT_INT8, OrtRunner
from regionspot.runtime.tolerance import INT8, measure, worst
from regionspot.runtime.torch_runner import TorchRunner

K, N = 32, 24
OUTLIERS = [3, 17]


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    outputs: tuple[str, ...],
) -> Path:
    """A graph from "x" (B, T, K) to (B, T, ...)."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", K])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [
            numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def feeds(seed: int = 0, count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(2, 50, K)).astype(np.float32)} for _ in range(count)]


def sqnr_db(exact: Path, quantized: Path, output: str = "y") -> float:
    feed = feeds(seed=9, count=1)[0]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*EXACT_INT8)  # as `OrtRunner` asks for
    wanted, found = (
        onnxruntime.InferenceSession(path, options).run([output], feed)[0]
        for path in (exact, quantized)
    )
    return measure(wanted, found).sqnr_db


def with_outliers(path: Path, also_read: bool = False) -> Path:
    """A LayerNorm with two channels 80 times as large as the others, and a layer that makes as
    little of them.

    That is what CLIP's and SAM's activations look like.
    """
    rng = np.random.default_rng(1)
    gamma, weight = np.ones(K), rng.normal(size=(K, N))
    gamma[OUTLIERS] *= 80
    weight[OUTLIERS] /= 80
    nodes = [
        helper.make_node(
            "LayerNormalization", ["x", "gamma", "beta"], ["n"], "block.norm/LayerNormalization"
        ),
        helper.make_node("Transpose", ["n"], ["t"], "block/Transpose", perm=[1, 0, 2]),
        helper.make_node("MatMul", ["t", "w"], ["m"], "block.linear/MatMul"),
        helper.make_node("Add", ["m", "b"], ["y"], "block.linear/Add"),
    ]
    if also_read:
        nodes.append(helper.make_node("Relu", ["n"], ["z"], "block/Relu"))
    weights = {"gamma": gamma, "beta": rng.normal(size=K), "w": weight, "b": rng.normal(size=N)}
    return write(path, nodes, weights, ("y", "z") if also_read else ("y",))


def test_symmetric_pairs_around_a_linear_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "layer/MatMul"),
        helper.make_node("Add", ["m", "b"], ["y"], "layer/Add"),
    ]
    source = write(
        tmp_path / "a.onnx", nodes, {"w": rng.normal(size=(K, N)), "b": rng.normal(size=N)}, ("y",)
    )
    (report,) = quantize(source, feeds(), tmp_path / "out.onnx")
    assert report.names == ("layer/MatMul",) and report.quantized and report.sqnr_db > 35
    assert sqnr_db(source, tmp_path / "out.onnx") > 35
    model = onnx.load(tmp_path / "out.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "precision": "int8",
        "quantized_layers": "1 of 1",
    }
    assert Counter(node.op_type for node in model.graph.node) == {
        "QuantizeLinear": 1,
        "DequantizeLinear": 2,
        "MatMul": 1,
        "Add": 1,
    }
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type.endswith("eLinear"):
            assert arrays[node.input[2]].dtype == np.int8 and not arrays[node.input[2]].any()
    assert {name: array.dtype.name for name, array in arrays.items() if array.size >= N} == {
        "b": "float32",
        "layer/MatMul.weight.quantized": "int8",
        "layer/MatMul.weight.scale": "float32",
        "layer/MatMul.weight.zero_point": "int8",
    }
    # each channel fills its range
    assert np.abs(arrays["layer/MatMul.weight.quantized"]).max(0).tolist() == [127] * N


def test_fp8_is_floating_point_with_one_scale_for_each_channel(tmp_path: Path) -> None:
    """Small inputs keep their digits beside large ones, where int8 keeps few."""
    rng = np.random.default_rng(2)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "layer/MatMul")]
    weight = rng.normal(size=(K, N)) * np.exp(2 * rng.normal(size=(K, 1)))
    source = write(tmp_path / "a.onnx", nodes, {"w": weight}, ("y",))
    (report,) = quantize(source, feeds(), tmp_path / "out.onnx", "fp16", "fp8")
    assert report.quantized and report.sqnr_db > 25
    assert sqnr_db(source, tmp_path / "out.onnx") > 25
    model = onnx.load(tmp_path / "out.onnx")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    weight_name = "layer/MatMul.weight.quantized"
    assert types[weight_name] == types["x.zero_point"] == TensorProto.FLOAT8E4M3FN
    (tensor,) = (one for one in model.graph.initializer if one.name == weight_name)
    stored = numpy_helper.to_array(tensor).astype(np.float32)
    assert np.abs(stored).max(0).tolist() == [448.0] * N
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "precision": "fp8",
        "quantized_layers": "1 of 1",
    }


def test_for_a_gpu_all_but_int8_is_in_half_precision(tmp_path: Path) -> None:
    """The scales too: no Cast stands inside of the graph, and a tiny scale does not become 0."""
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(K, N))
    weight[:, 0] *= 1e-6  # its scale in half precision would be 0
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["f"], "first/MatMul"),
        helper.make_node("MatMul", ["f", "w"], ["m"], "layer/MatMul"),
        helper.make_node("Add", ["m", "b"], ["y"], "layer/Add"),
    ]
    weights = {"first": rng.normal(size=(K, K)), "w": weight, "b": rng.normal(size=N)}
    source = write(tmp_path / "a.onnx", nodes, weights, ("y",))
    reports = quantize(source, feeds(), tmp_path / "out.onnx", rest="fp16")
    assert [report.quantized for report in reports] == [True, True]
    assert sqnr_db(source, tmp_path / "out.onnx") > 30
    model = onnx.load(tmp_path / "out.onnx")
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert [list(node.output) for node in casts] == [["y"]]
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    types = {
        (node.op_type, arrays[node.input[1]].dtype.name)
        for node in model.graph.node
        if node.op_type.endswith("eLinear")
    }
    # what the graph is given is in single precision
    assert types == {
        ("QuantizeLinear", "float32"),
        ("QuantizeLinear", "float16"),
        ("DequantizeLinear", "float16"),
    }
    scales = [array for name, array in arrays.items() if ".scale" in name]
    assert all((array.astype(np.float16) == array).all() for array in scales)
    assert all((array > 0).all() for array in scales)


def test_outliers_move_into_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_outliers(tmp_path / "a.onnx")
    quantize(source, feeds(), tmp_path / "smooth.onnx")
    assert sqnr_db(source, tmp_path / "smooth.onnx") > 35
    assert Counter(node.op_type for node in onnx.load(tmp_path / "smooth.onnx").graph.node) == {
        "LayerNormalization": 1,
        "Transpose": 1,
        "QuantizeLinear": 1,
        "DequantizeLinear": 2,
        "MatMul": 1,
        "Add": 1,
    }
    monkeypatch.setattr(quantization_search, "SMOOTHING", (0.0,))
    monkeypatch.setattr(quantization, "MIN_SQNR_DB", 0.0)
    quantize(source, feeds(), tmp_path / "plain.onnx")
    assert sqnr_db(source, tmp_path / "plain.onnx") < 20


def test_a_norm_that_others_read_is_not_touched(tmp_path: Path) -> None:
    source = with_outliers(tmp_path / "a.onnx", also_read=True)
    (report,) = quantize(source, feeds(), tmp_path / "out.onnx")
    assert not report.quantized and report.sqnr_db < quantization.MIN_SQNR_DB
    assert (
        sqnr_db(source, tmp_path / "out.onnx") == sqnr_db(source, tmp_path / "out.onnx", "z") == 200
    )


def test_a_sensitive_layer_stays_as_it_is(tmp_path: Path) -> None:
    """One channel is large and means nothing: int8 would be spent on it."""
    rng = np.random.default_rng(3)
    scale, large = np.ones(K), rng.normal(size=(K, N))
    scale[5], large[5] = 5000.0, 0.0
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["s"], "first/Mul"),
        helper.make_node("MatMul", ["s", "large"], ["l"], "first/MatMul"),
        helper.make_node("Relu", ["l"], ["r"], "first/Relu"),
        helper.make_node("MatMul", ["r", "w"], ["y"], "second/MatMul"),
    ]
    weights = {"scale": scale, "large": large, "w": rng.normal(size=(N, N))}
    source = write(tmp_path / "a.onnx", nodes, weights, ("y",))
    reports = quantize(source, feeds(), tmp_path / "out.onnx")
    assert [(report.names, report.quantized) for report in reports] == [
        (("first/MatMul",), False),
        (("second/MatMul",), True),
    ]
    assert sqnr_db(source, tmp_path / "out.onnx") > 30
    props = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert props["quantized_layers"] == "1 of 2"


def test_layers_that_read_the_same_become_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    nodes = [
        helper.make_node("MatMul", ["x", f"w{i}"], [f"m{i}"], f"attn.proj{i}/MatMul")
        for i in range(3)
    ]
    nodes.append(helper.make_node("Concat", ["m2", "m0", "m1"], ["y"], "attn/Concat", axis=-1))
    weights = {f"w{i}": rng.normal(size=(K, 8 * (i + 1))) for i in range(3)}
    source = write(tmp_path / "a.onnx", nodes, weights, ("y", "m1"))
    (report,) = quantize(source, feeds(), tmp_path / "out.onnx")
    assert report == LayerReport(tuple(f"attn.proj{i}/MatMul" for i in range(3)), report.sqnr_db)
    for output in ("y", "m1"):
        assert sqnr_db(source, tmp_path / "out.onnx", output) > 35
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node)
    assert (kinds["MatMul"], kinds["Split"], kinds["QuantizeLinear"]) == (1, 1, 1)


def test_what_is_not_a_linear_layer_stays(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    nodes = [
        # outside of any module: the graph's own algebra
        helper.make_node("MatMul", ["x", "w"], ["a"], "/MatMul"),
        helper.make_node("Transpose", ["a"], ["t"], "block/Transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["a", "t"], ["y"], "block/MatMul"),
    ]
    source = write(tmp_path / "a.onnx", nodes, {"w": rng.normal(size=(K, N))}, ("y",))
    assert quantize(source, feeds(), tmp_path / "out.onnx") == ()
    assert sqnr_db(source, tmp_path / "out.onnx") == 200


def test_nothing_to_calibrate_with(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--calibration"):
        quantize(with_outliers(tmp_path / "a.onnx"), [], tmp_path / "out.onnx")


LAYERS = {
    "sam_image_encoder": 16,
    "clip_image_encoder": 16,
    "sam_token_decoder_image": 0,
    "sam_token_decoder_prompts": 22,
    "sam_mask_decoder": 31,
    "sam_mask_prompt": 0,
    "region_head": 0,
    "clip_text_encoder": 12,
}


@pytest.mark.parametrize("graph", [name for name in GRAPHS if name != "region_recognizer"])
def test_graphs(
    mini: RegionSpot,
    specs: dict[str, GraphSpec],
    graph_inputs: GraphInputs,
    exported: Callable[[str], Path],
    tmp_path: Path,
    graph: str,
) -> None:
    """Every graph of the mini model on pictures that it was not calibrated on, in kernels that are
    int8.
    """
    spec, path = specs[graph], tmp_path / "int8.onnx"
    real = graph_inputs.real(spec)
    reports = quantize(exported(graph), real[2:] or real, path)
    assert len(reports) == LAYERS[graph] and all(report.quantized for report in reports)
    with TorchRunner(graph_module(mini, graph), spec) as reference:
        expected = [reference.infer(feed) for feed in real[:2]]
    for runner in (
        OrtRunner(path, spec, threads=1, precision="int8"),
        OpenVinoRunner(path, spec, threads=1),
    ):
        with runner:
            for feed, wanted in zip(real, expected, strict=False):
                for name, array in runner.infer(feed).items():
                    assert not INT8.breaches(measure(wanted[name], array)), name
    assert int8_kernels_of_onnxruntime(path, tmp_path / "optimised.onnx") == len(reports)
    assert int8_kernels_of_openvino(path) == len(reports)


@pytest.mark.parametrize("graph", ["clip_image_encoder", "sam_token_decoder_prompts"])
def test_half_precision_around_int8_costs_nothing(
    mini: RegionSpot,
    specs: dict[str, GraphSpec],
    graph_inputs: GraphInputs,
    exported: Callable[[str], Path],
    tmp_path: Path,
    graph: str,
) -> None:
    """On real graphs int8's own rounding is the larger one by far."""
    spec = specs[graph]
    real = graph_inputs.real(spec)
    with TorchRunner(graph_module(mini, graph), spec) as reference:
        expected = [reference.infer(feed) for feed in real[:2]]
    found = {}
    for rest in ("fp32", "fp16"):
        path = tmp_path / f"{rest}.onnx"
        quantize(exported(graph), real[2:], path, rest)
        with OrtRunner(path, spec, threads=1, precision="int8") as runner:
            outputs = [runner.infer(feed) for feed in real[:2]]
        found[rest] = worst(
            [
                measure(wanted[name], array)
                for wanted, given in zip(expected, outputs, strict=True)
                for name, array in given.items()
            ]
        )
        assert not INT8.breaches(found[rest])
    assert found["fp16"].sqnr_db > found["fp32"].sqnr_db - 1


def test_the_roofline_knows_what_has_no_int8() -> None:
    assert {name for name, graph in GRAPHS.items() if not graph.quantized} == {
        graph for graph, layers in LAYERS.items() if layers == 0
    }


def int8_kernels_of_onnxruntime(path: Path, optimised: Path) -> int:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return sum(node.op_type == "MatMulIntegerToFloat" for node in onnx.load(optimised).graph.node)


def int8_kernels_of_openvino(path: Path) -> int:
    model = (
        openvino.Core()
        .compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        .get_runtime_model()
    )
    layers = [operation.get_rt_info() for operation in model.get_ordered_ops()]
    return sum(
        str(info["layerType"].value) == "FullyConnected"
        and str(info["runtimePrecision"].value) == "i8"
        for info in layers
    )
