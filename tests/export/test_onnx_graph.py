"""ONNX files: valid, named as the spec says, equal to the model at sizes that were not traced, and
free of waste.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxscript import ir
from torch import Tensor, nn

from regionspot.errors import ArtifactError, InputError
from regionspot.export import onnx_files, onnx_graph
from regionspot.export.graph_inputs import GraphInputs
from regionspot.export.made_with import preprocessing_of
from regionspot.export.onnx_files import save
from regionspot.export.onnx_graph import export_onnx, trace, tracing_sizes
from regionspot.export.onnx_passes import simplify
from regionspot.mini.architecture import build_mini_sam
from regionspot.modeling.graphs import graph_module
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.graphs import GRAPHS
from regionspot.runtime.ort_runner import OrtRunner
from regionspot.runtime.tolerance import RUNTIME_FP32, measure
from regionspot.runtime.torch_runner import TorchRunner
from tests.modeling.test_sam import ConvEncoder

ROOT = Path(__file__).resolve().parents[2]
LARGE = {
    "batch": 2,
    "regions": 300,
    "prompts": 64,
    "points": 2,
    "tokens": 4,
    "words": 100,
    "texts": 50,
    "text_length": 100,
}
ODD = {
    "batch": 4,
    "regions": 6,
    "prompts": 8,
    "points": 5,
    "tokens": 3,
    "words": 11,
    "texts": 9,
    "text_length": 8,
}


def op_types(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("graph", GRAPHS)
def test_equal_to_the_model(
    mini: RegionSpot,
    specs: dict[str, GraphSpec],
    graph_inputs: GraphInputs,
    exported: Callable[[str], Path],
    graph: str,
) -> None:
    spec = specs[graph]
    within = {axis: min(LARGE[axis], limits.max) for axis, limits in spec.ranges.items()}
    smallest = {axis: limits.min for axis, limits in spec.ranges.items()}
    if graph in ("sam_mask_decoder", "region_recognizer"):
        within["batch"] = 1  # memory
    feeds = [
        graph_inputs.seeded(spec, seed, sizes) for seed, sizes in enumerate((ODD, smallest, within))
    ]
    with (
        OrtRunner(exported(graph), spec, threads=1) as ort,
        TorchRunner(graph_module(mini, graph), spec) as reference,
    ):
        for feed in [*feeds, graph_inputs.real(spec, 1)[0]]:
            feed = {name: feed[name] for name in spec.input_names}
            expected = reference.infer(feed)
            for name, array in ort.infer(feed).items():
                assert not RUNTIME_FP32.breaches(measure(expected[name], array)), (
                    name,
                    array.shape,
                )


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_file(
    mini: RegionSpot, specs: dict[str, GraphSpec], exported: Callable[[str], Path], graph: str
) -> None:
    content = exported(graph).read_bytes()
    model = onnx.load_from_string(content)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata == {
        "graph": graph,
        "model": "regionspot_mini",
        "precision": "fp32",
        "preprocessing": preprocessing_of(mini).fingerprint(),
        "target": "cpu",
    }
    for tensors, values in (
        (specs[graph].inputs, model.graph.input),
        (specs[graph].outputs, model.graph.output),
    ):
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        for tensor, value in zip(tensors, values, strict=True):
            axes = tuple(
                axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim
            )
            assert axes == tensor.shape
            assert (
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                == tensor.dtype
            )
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(names)
    assert str(ROOT).encode() not in content and b"stack_trace" not in content
    assert not list(exported(graph).parent.glob(".*"))


@pytest.mark.parametrize("graph", [name for name in GRAPHS if name != "region_recognizer"])
def test_weights_are_there_once(
    mini: RegionSpot, exported: Callable[[str], Path], graph: str
) -> None:
    tensors = onnx.load(exported(graph)).graph.initializer
    contents = Counter(
        (tuple(tensor.dims), tensor.data_type, tensor.raw_data) for tensor in tensors
    )
    assert max(contents.values()) == 1
    module = graph_module(mini, graph)
    known = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    assert sum(np.prod(tensor.dims) for tensor in tensors) < 1.05 * known


def test_norms_and_attention_are_recognisable(exported: Callable[[str], Path]) -> None:
    """What runtimes have fused kernels for stands in one node, or in the chain of nodes that they
    look for.
    """
    assert op_types(exported("clip_image_encoder"))["LayerNormalization"] == 1 + 4 * 2
    assert op_types(exported("sam_image_encoder"))["LayerNormalization"] == 4 * 2
    assert op_types(exported("sam_image_encoder"))["Gelu"] == 4
    assert op_types(exported("region_head"))["LayerNormalization"] == 3 * 3 + 1
    for graph in ("sam_image_encoder", "clip_image_encoder", "clip_text_encoder", "region_head"):
        found = op_types(exported(graph))
        assert not {"Einsum", "IsNaN", "Gemm", "Erf", "Split", "Identity"} & set(found)
        model = ir.load(exported(graph))
        for softmax in (node for node in model.graph if node.op_type == "Softmax"):
            (reader,) = (usage.node for usage in softmax.outputs[0].uses())
            assert reader.op_type == "MatMul"


def test_node_names_say_where_they_are_from(exported: Callable[[str], Path]) -> None:
    scopes = {
        node.name.rpartition("/")[0]
        for node in onnx.load(exported("sam_token_decoder_prompts")).graph.node
    }
    assert {"decoder.first.mlp.lin1", "decoder.second.self_attn.q_proj"} <= scopes
    assert any("variance" in scope for scope in scopes)  # what regionspot.export.precision goes by


def test_tracing_sizes() -> None:
    ranges = {
        "a": Range(1, 1, 8),
        "b": Range(1, 2, 4),
        "c": Range(1, 1, 2),
        "d": Range(4, 4, 4),
        "e": Range(1, 80, 300),
    }
    sizes = tracing_sizes(ranges)
    assert all(ranges[axis].min <= size <= ranges[axis].max for axis, size in sizes.items())
    assert len(set(sizes.values())) == 5 and 1 not in sizes.values()
    assert tracing_sizes({"a": Range(1, 1, 1), "b": Range(1, 1, 2), "c": Range(2, 2, 2)}) == {
        "a": 1,
        "b": 2,
        "c": 2,
    }


def test_axes_of_one_size(mini: RegionSpot, specs: dict[str, GraphSpec], tmp_path: Path) -> None:
    fixed = Range(1, 1, 1)
    spec = replace(specs["clip_image_encoder"], ranges={"batch": fixed})
    export_onnx(mini, spec, tmp_path / "one.onnx")
    model = onnx.load(tmp_path / "one.onnx")
    assert [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim] == [
        1,
        192,
        192,
        3,
    ]
    assert [axis.dim_value for axis in model.graph.output[0].type.tensor_type.shape.dim] == [
        1,
        145,
        192,
    ]
    assert not {"Shape", "Expand"} & {node.op_type for node in model.graph.node}


def test_another_image_encoder_is_exported_as_it_is(
    mini: RegionSpot, specs: dict[str, GraphSpec], graph_inputs: GraphInputs, tmp_path: Path
) -> None:
    sam = build_mini_sam()
    sam.image_encoder = ConvEncoder(channels=128, patch=16)
    model = RegionSpot(SamBackbone(sam), mini.clip, mini.head, "regionspot_conv")
    spec = specs["sam_image_encoder"]
    export_onnx(model, spec, tmp_path / "conv.onnx")
    feeds = graph_inputs.seeded(spec, 0, ODD)
    with OrtRunner(tmp_path / "conv.onnx", spec, threads=1) as runner:
        (found,) = runner.infer(feeds).values()
    (expected,) = TorchRunner(graph_module(model, spec.name), spec).infer(feeds).values()
    assert not RUNTIME_FP32.breaches(measure(expected, found))


def test_large_graphs_keep_their_weights_beside_them(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "MAX_FILE_BYTES", 100_000)
    save(ir.load(exported("region_head")), tmp_path / "head.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.onnx", "head.onnx.data"]
    assert (
        (tmp_path / "head.onnx").stat().st_size
        < 500_000
        < (tmp_path / "head.onnx.data").stat().st_size
    )
    whole, split = (
        onnx.load(path).graph.initializer
        for path in (exported("region_head"), tmp_path / "head.onnx")
    )
    for one, other in zip(whole, split, strict=True):
        np.testing.assert_array_equal(
            onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other)
        )


def test_invalid_onnx_never_gets_a_name(exported: Callable[[str], Path], tmp_path: Path) -> None:
    model = ir.load(exported("sam_token_decoder_image"))
    model.graph.node(0).op_type = "Frobnicate"
    with pytest.raises(ArtifactError, match="not valid ONNX"):
        save(model, tmp_path / "broken.onnx")
    assert not list(tmp_path.iterdir())


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.cat([x, x]),)


def test_a_graph_that_is_not_its_spec_is_refused() -> None:
    x, y = TensorSpec("x", "float32", ("batch", 3)), TensorSpec("y", "float32", ("batch", 3))
    spec = GraphSpec("doubled", "", (x,), (y,), {"batch": Range(1, 1, 8)})
    model = trace(Doubled().eval(), spec, torch.device("cpu"))
    simplify(model)
    with pytest.raises(ArtifactError, match=r"outputs.*where its spec says"):
        onnx_graph.check_tensors(model, spec)


def test_the_mha_kernel_is_put_back(
    mini: RegionSpot, specs: dict[str, GraphSpec], tmp_path: Path
) -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ArtifactError, match="where its spec says"):
        wrong = replace(
            specs["sam_token_decoder_image"], outputs=specs["sam_token_decoder_image"].outputs[::-1]
        )
        export_onnx(mini, wrong, tmp_path / "wrong.onnx")
    assert torch.backends.mha.get_fastpath_enabled() and not list(tmp_path.iterdir())


def test_a_model_in_half_precision_is_refused(
    mini: RegionSpot, specs: dict[str, GraphSpec], tmp_path: Path
) -> None:
    half = copy.deepcopy(mini).bfloat16()
    with pytest.raises(
        InputError, match="the model is in bf16, and export converts precisions itself"
    ):
        export_onnx(half, specs["region_head"], tmp_path / "graph.onnx")
    assert not list(tmp_path.iterdir())
