"""Where two ONNX files of a graph part: which tensors are compared, in which order and how many at
a time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from regionspot.export import divergence
from regionspot.export.divergence import Divergence, OnnxSide, chunks, comparable, find_divergence
from regionspot.export.precision import write_half
from regionspot.export.quantization import quantize
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.tolerance import HALF, INT8, RUNTIME_FP32, Tolerance

K = 16
SPEC = GraphSpec(
    "test",
    "",
    (TensorSpec("x", "float32", ("batch", 8, K)),),
    (TensorSpec("y", "float32", ("batch", 8, K)),),
    {"batch": Range(1, 1, 4)},
)
ONES = {name: np.ones(K) for name in ("gamma", "beta")}
FEEDS = {"x": np.random.default_rng(1).normal(size=(2, 8, K)).astype(np.float32)}


def write(path: Path, weights: dict[str, np.ndarray], activation: str = "Relu") -> Path:
    """Two blocks of a norm, a product and an activation, one after the other."""
    nodes = []
    source = "x"
    for index in range(2):
        steps = [
            ("LayerNormalization", "norm", [source, "gamma", "beta"]),
            ("MatMul", "linear", [f"norm{index}", f"w{index}"]),
            (activation, "act", [f"linear{index}"]),
        ]
        for op, name, inputs in steps:
            output = "y" if (index, name) == (1, "act") else f"{name}{index}"
            nodes.append(helper.make_node(op, inputs, [output], f"block{index}.{name}/{op}"))
        source = f"act{index}"
    shape: list[str | int | None] = ["batch", 8, K]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in {**ONES, **weights}.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"w{index}": rng.normal(size=(K, K)) for index in range(2)}


@pytest.fixture
def exact(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    return write(tmp_path / "exact.onnx", weights)


def between(a: Path, b: Path, tolerance: Tolerance, precision: str = "fp32") -> Divergence:
    sides = OnnxSide(a, "fp32", threads=1), OnnxSide(b, precision, threads=1)
    return find_divergence(*sides, SPEC, FEEDS, tolerance)


def test_the_first_tensor_that_differs(
    exact: Path, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    changed = write(tmp_path / "changed.onnx", {**weights, "w1": weights["w1"] * 1.5})
    found = between(exact, changed, RUNTIME_FP32)
    assert [row.name for row in found.first] == ["linear1", "y"]
    assert found.compared == 6 and found.left_out == 0
    assert found.largest_drop is not None and found.largest_drop.name == "linear1"
    # what is computed from it differs because of it
    assert found.first[1].drop_db < 10 < found.largest_drop.drop_db


def test_the_search_ends_where_enough_was_found(
    exact: Path, weights: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = write(tmp_path / "changed.onnx", {**weights, "w0": -weights["w0"]})
    monkeypatch.setattr(divergence, "FIRST", 1)
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 1)
    found = between(exact, changed, RUNTIME_FP32)
    assert [row.name for row in found.first] == ["linear0"] and found.compared == 2


def test_converted_files_have_the_same_names_for_the_same_values(
    exact: Path, tmp_path: Path
) -> None:
    write_half(exact, tmp_path / "fp16.onnx", "fp16")
    half = between(exact, tmp_path / "fp16.onnx", HALF, "fp16")
    assert not half.first and (half.compared, half.left_out) == (6, 0)
    # outliers that int8 divides by, in the norm before the product
    outliers = {**ONES, "gamma": np.where(np.arange(K) == 3, 100.0, 1.0)}
    rng = np.random.default_rng(2)
    wide = {f"w{index}": rng.normal(size=(K, K)) / outliers["gamma"][:, None] for index in (0, 1)}
    source = write(tmp_path / "wide.onnx", {**wide, **outliers})
    quantize(source, [FEEDS], tmp_path / "int8.onnx", "fp16")
    int8 = between(source, tmp_path / "int8.onnx", INT8, "int8")
    assert not int8.first and (int8.compared, int8.left_out) == (4, 2)


def test_what_is_not_finite_on_one_side_alone(
    exact: Path, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    overflowing = write(tmp_path / "huge.onnx", {**weights, "w0": weights["w0"] * 1e38})
    found = between(exact, overflowing, HALF)
    assert found.first[0].difference is None and found.first[0].name == "linear0"
    assert found.first[0].breaches == ("NaN or infinite on one side alone",)


def test_of_other_layouts_only_equal_modules_are_compared(
    exact: Path, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    other = write(tmp_path / "other.onnx", weights, activation="Tanh")
    graphs = ir.load(exact).graph, ir.load(other).graph
    names = [value.name for value in comparable(*graphs, same_layout=False)]
    assert names == ["norm0", "linear0", "norm1", "linear1"]
    assert len(comparable(*graphs, same_layout=True)) == 6


def test_chunks_hold_so_much_and_one_at_least(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = ir.load(exact).graph
    values = comparable(graph, graph, same_layout=True)
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 2 * 4 * 2 * 8 * K)  # two values of batch 2
    assert [len(chunk) for chunk in chunks(values, {"batch": 2})] == [2, 2, 2]
    assert [len(chunk) for chunk in chunks(values, {"batch": 5})] == [1] * 6


def test_files_are_run_under_their_own_suffix(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's runner tells by it that int8 graphs for GPUs hold half precision."""
    opened: list[str] = []
    open_session = divergence.open_session

    def noted(path: Path, *arguments: object) -> object:
        opened.append(path.name)
        return open_session(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(divergence, "open_session", noted)
    for_gpu = tmp_path / "exact.gpu.onnx"
    for_gpu.write_bytes(exact.read_bytes())
    between(for_gpu, exact, RUNTIME_FP32)
    assert [name.partition(".")[2] for name in opened] == ["gpu.onnx", "onnx"]
