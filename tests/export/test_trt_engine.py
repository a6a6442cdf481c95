"""Engines built ahead of time with TensorRT-RTX, which needs no GPU, and everything around the
build.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from regionspot.errors import ArtifactError, InputError
from regionspot.export import trt_engine
from regionspot.export.making import EngineOptions, Making
from regionspot.export.plan import Step
from regionspot.export.trt_engine import RTX_CAPABILITIES, build_engine
from regionspot.export.trt_progress import PERCENT, Phases
from regionspot.modeling.regionspot import RegionSpot
from regionspot.progress import Progress
from regionspot.runtime.engine_file import (
    FLAVOURS,
    HARDWARE_LEVELS,
    read_engine,
    read_sidecar,
    sidecar_path,
)
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.trt_library import load_library, logger_of

pytest.importorskip("tensorrt_rtx_bindings")

SPEC = GraphSpec(
    "small",
    "every dtype of a boundary: uint8 images, int32 sizes, bool, float32",
    (
        TensorSpec("images", "uint8", ("batch", 4, 4, 3)),
        TensorSpec("input_sizes", "int32", ("batch", 2)),
        TensorSpec("valid", "bool", ("batch", "regions")),
        TensorSpec("text_embeddings", "float32", ("words", 8)),
    ),
    (TensorSpec("logits", "float32", ("batch", "regions", "words")),),
    {"batch": Range(1, 1, 8), "regions": Range(1, 32, 300), "words": Range(1, 80, 2048)},
)
WEIGHT = np.random.default_rng(0).standard_normal((48, 8)).astype(np.float32)


def save_small(
    path: Path, *, cast_first: bool = True, tokens: int | str = "words", data: bool = False
) -> Path:
    """The ONNX file of SPEC: the images' projection where valid, times the height, against the
    words.
    """
    to_float = [helper.make_node("Cast", ["images"], ["pixels"], "to_float", to=TensorProto.FLOAT)]
    if not cast_first:
        to_float = [
            helper.make_node("Transpose", ["images"], ["turned"], "turn", perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["turned"], ["pixels"], "to_float", to=TensorProto.FLOAT),
        ]
    nodes = [
        *to_float,
        helper.make_node("Reshape", ["pixels", "rows"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "weight"], ["projected"], "project"),
        helper.make_node("Unsqueeze", ["valid", "last"], ["mask"], "mask"),
        helper.make_node("Where", ["mask", "projected", "zero"], ["kept"], "keep"),
        helper.make_node(
            "Cast", ["input_sizes"], ["sizes"], "sizes_to_float", to=TensorProto.FLOAT
        ),
        helper.make_node("Gather", ["sizes", "first"], ["heights"], "height", axis=1),
        helper.make_node("Unsqueeze", ["heights", "last"], ["scale"], "scale"),
        helper.make_node("Mul", ["kept", "scale"], ["scaled"], "scaled"),
        helper.make_node("Transpose", ["text_embeddings"], ["classes"], "classes", perm=[1, 0]),
        helper.make_node("MatMul", ["scaled", "classes"], ["logits"], "cosines"),
    ]
    constants: dict[str, Any] = {
        "weight": WEIGHT,
        "rows": np.array([-1, 1, 48], dtype=np.int64),
        "last": np.array([2], dtype=np.int64),
        "first": np.array([0], dtype=np.int64),
        "zero": np.zeros((), dtype=np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 4, 4, 3]),
            helper.make_tensor_value_info("input_sizes", TensorProto.INT32, ["batch", 2]),
            helper.make_tensor_value_info("valid", TensorProto.BOOL, ["batch", "regions"]),
            helper.make_tensor_value_info("text_embeddings", TensorProto.FLOAT, [tokens, 8]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "regions", tokens])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    external: dict[str, Any] = {
        "save_as_external_data": True,
        "location": f"{path.name}.data",
        "size_threshold": 64,
    }
    onnx.save(model, path, **(external if data else {}))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save_small(tmp_path / "small.onnx")


def test_build(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "small.engine"
    sidecar = build_engine(small, SPEC, out, "tensorrt-rtx")
    plan = out.read_bytes()
    assert plan.startswith(b"vtrt"), "the plan must stay as it was built"
    assert (sidecar.size_bytes, sidecar.sha256) == (len(plan), hashlib.sha256(plan).hexdigest())
    assert sidecar.onnx == {"small.onnx": hashlib.sha256(small.read_bytes()).hexdigest()}
    assert (
        sidecar.compute_capabilities == RTX_CAPABILITIES
        and sidecar.versions["tensorrt_rtx_bindings"]
    )
    assert [tensor.dtype for tensor in sidecar.inputs] == ["uint8", "int32", "bool", "float32"]
    assert sidecar.inputs[0].profile == ((1, 4, 4, 3), (1, 4, 4, 3), (8, 4, 4, 3))
    assert sidecar.inputs[2].profile == ((1, 1), (1, 32), (8, 300)) and sidecar.outputs[
        0
    ].shape == (-1, -1, -1)
    assert (read_sidecar(out), read_engine(out, SPEC, "tensorrt-rtx")) == (sidecar, (plan, sidecar))
    assert json.loads(sidecar_path(out).read_text())["graph"] == "small"
    assert sorted(path.name for path in out.parent.iterdir()) == ["small.engine", "small.json"]


def test_external_data_belongs_to_the_source(tmp_path: Path) -> None:
    path = save_small(tmp_path / "small.onnx", data=True)
    sidecar = build_engine(
        path, SPEC, tmp_path / "small.engine", "tensorrt-rtx", compute_capabilities=[89]
    )
    assert list(sidecar.onnx) == [
        "small.onnx",
        "small.onnx.data",
    ] and sidecar.compute_capabilities == (89,)
    assert WEIGHT.tobytes() in (tmp_path / "small.onnx.data").read_bytes()


def test_fixed_axes_need_no_profile(tmp_path: Path) -> None:
    spec = replace(SPEC, ranges={**SPEC.ranges, "words": Range(5, 5, 5)})
    path = save_small(tmp_path / "small.onnx", tokens=5)
    sidecar = build_engine(path, spec, tmp_path / "small.engine", "tensorrt-rtx")
    assert sidecar.inputs[3].shape == (5, 8) and sidecar.outputs[0].shape == (-1, -1, 5)
    with pytest.raises(
        ArtifactError, match=r"text_embeddings is float32 \(5, 8\) instead of float32 \(words, 8\)"
    ):
        build_engine(path, SPEC, tmp_path / "small.engine", "tensorrt-rtx")


def test_int8_with_symmetric_quantisation(tmp_path: Path) -> None:
    """Quantise and dequantise, per tensor at the activation and per channel at the weight, around a
    MatMul.
    """
    constants: dict[str, Any] = {
        "scale_x": np.float32(0.02),
        "zero_x": np.int8(0),
        "weight": np.random.default_rng(0).integers(-127, 127, (16, 8), dtype=np.int8),
        "scale_w": np.full(8, 0.01, dtype=np.float32),
        "zero_w": np.zeros(8, dtype=np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale_x", "zero_x"], ["x_int8"], "quantize"),
        helper.make_node(
            "DequantizeLinear", ["x_int8", "scale_x", "zero_x"], ["x_float"], "dequantize"
        ),
        helper.make_node(
            "DequantizeLinear", ["weight", "scale_w", "zero_w"], ["weight_float"], "weights", axis=1
        ),
        helper.make_node("MatMul", ["x_float", "weight_float"], ["y"], "product"),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "int8.onnx")
    spec = GraphSpec(
        "int8",
        "",
        (TensorSpec("x", "float32", ("batch", 16)),),
        (TensorSpec("y", "float32", ("batch", 8)),),
        {"batch": Range(1, 1, 8)},
    )
    assert (
        build_engine(
            tmp_path / "int8.onnx", spec, tmp_path / "int8.engine", "tensorrt-rtx"
        ).size_bytes
        > 0
    )


def test_what_the_parser_refuses_is_named(tmp_path: Path) -> None:
    """TensorRT casts uint8 inputs and does nothing else with them."""
    path = save_small(tmp_path / "small.onnx", cast_first=False)
    with pytest.raises(ArtifactError, match=r"node turn \(Transpose\): .*UInt8") as caught:
        build_engine(path, SPEC, tmp_path / "small.engine", "tensorrt-rtx")
    assert "catchCudaError" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "small.engine").exists()


def test_what_the_parser_misreads_is_refused(tmp_path: Path) -> None:
    """The product of a vector with a batch of matrices is one row to TensorRT, and right for a
    batch of one only.
    """
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["vector", "x"], ["rows"], "product"),
            helper.make_node("MatMul", ["rows", "square"], ["y"], "project"),
        ],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [
            numpy_helper.from_array(np.ones(8, dtype=np.float32), "vector"),
            numpy_helper.from_array(np.eye(4, dtype=np.float32), "square"),
        ],
        value_info=[helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "product.onnx")
    spec = GraphSpec(
        "product",
        "",
        (TensorSpec("x", "float32", ("batch", 8, 4)),),
        # as TensorRT has it: the outputs do not give it away
        (TensorSpec("y", "float32", (1, 4)),),
        {"batch": Range(1, 1, 8)},
    )
    with pytest.raises(
        ArtifactError, match=r"misreads .*product\.onnx: the tensor rows is \(1, 4\) .*\(-1, 4\)"
    ):
        build_engine(tmp_path / "product.onnx", spec, tmp_path / "product.engine", "tensorrt-rtx")


def test_too_little_workspace(tmp_path: Path) -> None:
    """1 MiB for what lies between two products of 8 x 2048 x 2048 numbers."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["hidden"], "first"),
            helper.make_node("Softmax", ["hidden"], ["shares"], "shares", axis=1),
            helper.make_node("MatMul", ["shares", "weight"], ["y"], "second"),
        ],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2048, 2048])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2048, 2048])],
        [numpy_helper.from_array(np.eye(2048, dtype=np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "products.onnx")
    shape = ("batch", 2048, 2048)
    tensors = (TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", shape),)
    spec = GraphSpec("products", "", *tensors, {"batch": Range(1, 1, 8)})
    out = tmp_path / "products.engine"
    with pytest.raises(
        ArtifactError, match=r"OutOfMemory.*narrow the ranges, or give more workspace"
    ):
        build_engine(tmp_path / "products.onnx", spec, out, "tensorrt-rtx", workspace_mib=1)
    assert build_engine(tmp_path / "products.onnx", spec, out, "tensorrt-rtx").workspace_mib is None


def test_turing_takes_no_fp32_products(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"FP32 GEMM.*leave that compute capability out"):
        build_engine(
            small, SPEC, tmp_path / "small.engine", "tensorrt-rtx", compute_capabilities=[75, 89]
        )


def test_reasons_are_those_of_the_build_at_hand(small: Path, tmp_path: Path) -> None:
    """TensorRT has one logger for all builders that live; here the first lives on in its error."""
    out = tmp_path / "small.engine"
    with pytest.raises(ArtifactError) as first:
        build_engine(small, SPEC, out, "tensorrt-rtx", compute_capabilities=[75])
    with pytest.raises(ArtifactError) as second:
        build_engine(
            small, SPEC, out, "tensorrt-rtx", workspace_mib=1, compute_capabilities=[75, 89]
        )
    assert "FP32 GEMM" in str(first.value) and "FP32 GEMM" in str(second.value)
    assert build_engine(small, SPEC, out, "tensorrt-rtx").warnings == ()


def renamed(spec: GraphSpec) -> GraphSpec:
    return replace(spec, outputs=(replace(spec.outputs[0], name="scores"),))


def retyped(spec: GraphSpec) -> GraphSpec:
    return replace(spec, inputs=(replace(spec.inputs[0], dtype="float32"), *spec.inputs[1:]))


def reshaped(spec: GraphSpec) -> GraphSpec:
    return replace(
        spec, inputs=(replace(spec.inputs[0], shape=("batch", 8, 8, 3)), *spec.inputs[1:])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "output scores is missing; output logits is unknown"),
        (retyped, r"images is uint8 \(\?, 4, 4, 3\) instead of float32"),
        (reshaped, r"images is uint8 \(\?, 4, 4, 3\) instead of uint8 \(batch, 8, 8, 3\)"),
    ],
)
def test_tensors_must_be_the_specs(small: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        build_engine(small, change(SPEC), tmp_path / "small.engine", "tensorrt-rtx")
    assert not (tmp_path / "small.engine").exists()


def test_a_range_that_the_graph_cannot_run_is_an_error(tmp_path: Path) -> None:
    """TensorRT itself only warns that 6 words do not fit a table of 5 positions."""
    constants: dict[str, Any] = {
        "positions": np.arange(5, dtype=np.float32),
        "start": np.zeros(1, dtype=np.int64),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["length"], "length"),
            helper.make_node("Slice", ["positions", "start", "length"], ["known"], "known"),
            helper.make_node("Add", ["x", "known"], ["y"], "add"),
        ],
        "positions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["words"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["words"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "positions.onnx")
    tensors = (TensorSpec("x", "float32", ("words",)),), (TensorSpec("y", "float32", ("words",)),)
    spec = GraphSpec("positions", "", *tensors, {"words": Range(2, 5, 6)})
    with pytest.raises(ArtifactError, match="end of its ranges"):
        build_engine(
            tmp_path / "positions.onnx", spec, tmp_path / "positions.engine", "tensorrt-rtx"
        )


@pytest.mark.parametrize("content", [b"", b"no ONNX file" * 100])
def test_a_damaged_onnx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "small.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"small\.onnx"):
        build_engine(tmp_path / "small.onnx", SPEC, tmp_path / "small.engine", "tensorrt-rtx")


def test_a_missing_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"small\.onnx: No such file"):
        build_engine(tmp_path / "small.onnx", SPEC, tmp_path / "small.engine", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavour": "tensor"}, "no TensorRT flavour"),
        ({"flavour": "tensorrt-rtx", "compute_capabilities": [89, 90]}, r"7\.5, 8\.0.* not 9\.0"),
        (
            {"flavour": "tensorrt-rtx", "compute_capabilities": []},
            "one compute capability at least",
        ),
        ({"flavour": "tensorrt-rtx", "optimization_level": 6}, "0 to 5, not 6"),
        ({"flavour": "tensorrt-rtx", "workspace_mib": 0}, "1 MiB or more"),
        ({"flavour": "tensorrt-rtx", "version_compatible": True}, "or build with tensorrt"),
        (
            {"flavour": "tensorrt-rtx", "hardware_compatibility": "ampere_plus"},
            "or build with tensorrt",
        ),
        (
            {"flavour": "tensorrt", "hardware_compatibility": "turing_plus"},
            "'turing_plus': choose one of ampere_plus, same_compute_capability",
        ),
    ],
)
def test_options_out_of_range(
    small: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_engine(small, SPEC, tmp_path / "small.engine", **options)


def test_options_are_recorded(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    sidecar = build_engine(
        small,
        SPEC,
        tmp_path / "small.engine",
        "tensorrt-rtx",
        compute_capabilities=[120, 89, 89],
        optimization_level=1,
        workspace_mib=256,
        timing_cache=cache,
    )
    assert (sidecar.optimization_level, sidecar.workspace_mib) == (1, 256)
    assert sidecar.compute_capabilities == (89, 120)
    assert not cache.exists(), "TensorRT-RTX would look for a GPU with a timing cache"


def test_other_releases_are_asked_of_the_builder() -> None:
    """Of TensorRT-RTX's, which runs here and has this flag of TensorRT as well."""
    trt = load_library("tensorrt-rtx")
    builder, flag = trt.Builder(logger_of(trt)), trt.BuilderFlag.VERSION_COMPATIBLE
    for asked in (False, True):
        config = builder.create_builder_config()
        trt_engine._ask_for_compatibility(trt, config, asked, None)
        assert config.get_flag(flag) is asked


@pytest.mark.parametrize("level", HARDWARE_LEVELS)
def test_other_gpus_are_asked_of_the_builder(level: str) -> None:
    """By TensorRT's names; TensorRT-RTX has them, but its builder keeps to NONE."""
    trt = load_library("tensorrt-rtx")
    assert hasattr(trt.IBuilderConfig, "hardware_compatibility_level")
    config = SimpleNamespace()
    trt_engine._ask_for_compatibility(trt, config, False, level)
    wanted = trt.HardwareCompatibilityLevel.__members__[level.upper()]
    assert config.hardware_compatibility_level == wanted


def test_each_flavour_gets_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def build(onnx_path: Path, spec: GraphSpec, out: Path, flavour: str, **options: Any) -> None:
        given[flavour] = options

    monkeypatch.setattr(trt_engine, "build_engine", build)
    options = EngineOptions((89,), 2, 64, None, True, "ampere_plus")
    for flavour in FLAVOURS:
        step = Step(SPEC, flavour, "fp16")
        path, no_model = Path("small"), cast(RegionSpot, None)
        trt_engine.make(Making(step, path, path, no_model, "", lambda: (), options))
        given[flavour].pop("progress")
    shared = {"optimization_level": 2, "workspace_mib": 64, "timing_cache": None}
    assert given == {
        "tensorrt": shared | {"version_compatible": True, "hardware_compatibility": "ampere_plus"},
        "tensorrt-rtx": shared | {"compute_capabilities": (89,)},
    }


def test_a_missing_library_is_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        InputError, match=r"TensorRT cannot be imported.*https://pypi\.nvidia\.com.*stub"
    ):
        build_engine(small, SPEC, tmp_path / "small.plan", "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(InputError, match=r"tensorrt_rtx-cu13-bindings and tensorrt_rtx-cu13-libs"):
        build_engine(small, SPEC, tmp_path / "small.engine", "tensorrt-rtx")


def test_a_failed_build_leaves_the_old_engine(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.engine"
    sidecar = build_engine(small, SPEC, out, "tensorrt-rtx")
    with pytest.raises(ArtifactError):
        build_engine(small, renamed(SPEC), out, "tensorrt-rtx")
    assert read_engine(out, SPEC, "tensorrt-rtx")[1] == sidecar


def test_progress(small: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    with Progress("region_head", PERCENT, "%", stream=stream) as progress:
        build_engine(small, SPEC, tmp_path / "small.engine", "tensorrt-rtx", progress=progress)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("region_head: 0/100 %  Building") and lines[-1].startswith(
        "region_head: 100/100 %"
    )


class Interrupted(io.StringIO):
    """A stream that is written to just when Ctrl-C is pressed."""

    def write(self, text: str) -> int:
        raise KeyboardInterrupt


def test_ctrl_c_ends_a_build(small: Path, tmp_path: Path) -> None:
    """Python's exceptions must not pass through TensorRT, which would abort the process."""
    progress = Progress("build", PERCENT, "%", stream=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        build_engine(small, SPEC, tmp_path / "small.engine", "tensorrt-rtx", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


def test_nested_phases() -> None:
    phases = Phases()
    phases.start("build", None, 4)
    phases.complete("build", 0)
    assert phases.fraction == 0.25
    phases.start("tactics", "build", 2)
    phases.complete("tactics", 0)
    assert phases.fraction == 0.375
    phases.start("a layer", "tactics", 4)
    phases.complete("a layer", 1)
    assert phases.fraction == 0.25 + (0.5 + 0.25) / 4
    phases.finish("a layer")
    assert phases.fraction == 0.4375, "it never goes back"
    phases.finish("tactics")
    phases.finish("build")
    assert phases.fraction == 1.0
    phases.finish("unheard of")
