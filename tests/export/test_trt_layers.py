"""What TensorRT makes of a graph, read from the builder's log: by TensorRT-RTX, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from regionspot.errors import ArtifactError
from regionspot.export.graph_inputs import GraphInputs
from regionspot.export.onnx_graph import export_onnx
from regionspot.export.precision import write_half
from regionspot.export.quantization import REST, quantize
from regionspot.export.trt_engine import FP8_CAPABILITIES, build_engine
from regionspot.export.trt_layers import is_detail, report_of
from regionspot.modeling.graphs import graph_module, model_info
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.engine_file import read_sidecar
from regionspot.runtime.formats import GPU
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.graphs import gpu_graph_specs
from regionspot.runtime.ort_runner import OrtRunner
from regionspot.runtime.tolerance import QUANTIZED, RUNTIME_FP32, measure
from regionspot.runtime.torch_runner import TorchRunner

LAYER = (
    "Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: a, Dimensions: [{shape}], Strides: [1], "
    "Datatype: Half, Format: (Linear) }}], Constants: [ {{ Name: w, Dimensions: [1000,1000], "
    "Datatype: Float, Format: (Linear) }}], Outputs: [ {{ Name: b, Dimensions: [{shape}], "
    "Datatype: Float, Format: (Linear) }}], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: x]"
)


def test_figures_of_a_log() -> None:
    log = [
        LAYER.format(name="one", kind="gemm", shape="1000,1000"),
        LAYER.format(name="_gemm_mha_v2_myl0_7", kind="kgen", shape="500,1000"),
        LAYER.format(name="one", kind="gemm", shape="1000,1000"),  # printed twice
        "Max Scratch Memory: 10485760 bytes",
        "Name: not a layer",
    ]
    report = report_of(line for line in log if is_detail(line))
    assert report is not None
    assert (report.fused_attentions, report.kernels, report.scratch_mib) == (1, 2, 10.0)
    assert report.activation_gb == pytest.approx(1.5 * 6e6 / 1e9)  # without the weights
    assert report.types == {"gemm Half->Float": 1, "kgen Half->Float": 1}
    dynamic = report_of([LAYER.format(name="one", kind="gemm", shape="-1,1000")])
    assert dynamic is not None and dynamic.activation_gb is None and dynamic.scratch_mib is None
    assert report_of(["nothing of the kind"]) is None


def layers_of(
    onnx_file: Path,
    spec: GraphSpec,
    precision: str = "fp16",
    calibration: Sequence[Mapping[str, Any]] = (),
    capability: int = 89,
) -> dict[str, Any]:
    """Of the engine of a graph for one compute capability."""
    converted, engine = onnx_file.with_suffix(".low.onnx"), onnx_file.with_suffix(".engine")
    if precision in QUANTIZED:
        quantize(onnx_file, calibration, converted, REST[GPU], precision)
    else:
        write_half(onnx_file, converted, precision)
    build_engine(converted, spec, engine, "tensorrt-rtx", [capability])
    return read_sidecar(engine).layers


def products(layers: dict[str, Any]) -> dict[str, int]:
    """How many matrix products there are of which types; attentions are none of them."""
    return {kind: count for kind, count in layers["types"].items() if kind.startswith("gemm ")}


def test_every_attention_of_sam_is_one_kernel_in_the_form_for_gpus(
    mini: RegionSpot,
    specs: dict[str, GraphSpec],
    graph_inputs: GraphInputs,
    exported: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """And none is in the form for CPUs. Both forms give the model's numbers."""
    pytest.importorskip("tensorrt_rtx_bindings")
    spec = specs["sam_image_encoder"]
    depth = len(mini.sam.sam.image_encoder.blocks)
    for_cpu, for_gpu = tmp_path / "cpu.onnx", tmp_path / "gpu.onnx"
    for_cpu.write_bytes(exported("sam_image_encoder").read_bytes())
    export_onnx(mini, spec, for_gpu, target=GPU)
    fused, apart = layers_of(for_gpu, spec), layers_of(for_cpu, spec)
    assert (fused["fused_attentions"], apart["fused_attentions"]) == (depth, 0)
    assert fused["kernels"] < apart["kernels"] and fused["scratch_mib"] > 0
    for capability in (80, 86, 120):  # two Amperes and Blackwell; above is Ada
        others = layers_of(for_gpu, spec, capability=capability)
        assert others["fused_attentions"] == depth
    # no kernel without inputs: none copies a constant
    assert not any(kind.split()[-1] == "->Half" for kind in fused["types"]), fused["types"]
    feeds = graph_inputs.seeded(spec, 0, {"batch": 2})
    with (
        OrtRunner(for_gpu, spec, threads=1) as ort,
        TorchRunner(graph_module(mini, spec.name), spec) as reference,
    ):
        expected = reference.infer(feeds)["image_embeddings"]
        difference = measure(expected, ort.infer(feeds)["image_embeddings"])
    assert not RUNTIME_FP32.breaches(difference)


@pytest.mark.parametrize("graph", ["sam_token_decoder_prompts", "sam_mask_decoder"])
def test_the_token_decoders_scratch_memory_at_a_servers_sizes(
    graph: str,
    mini: RegionSpot,
    specs: dict[str, GraphSpec],
    exported: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """One image and 32 prompts need a small part of what eight images with 64 prompts each do."""
    pytest.importorskip("tensorrt_rtx_bindings")
    copied = tmp_path / "decoder.onnx"
    copied.write_bytes(exported(graph).read_bytes())
    of_server = layers_of(copied, gpu_graph_specs(model_info(mini))[graph])
    assert 0 < of_server["scratch_mib"] < layers_of(copied, specs[graph])["scratch_mib"] / 8


def test_every_attention_of_clip_is_one_kernel(
    mini: RegionSpot,
    specs: dict[str, GraphSpec],
    graph_inputs: GraphInputs,
    exported: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """In int8 and fp8 too, where every other product is, and gives half precision."""
    pytest.importorskip("tensorrt_rtx_bindings")
    copied, spec = tmp_path / "clip.onnx", specs["clip_image_encoder"]
    copied.write_bytes(exported("clip_image_encoder").read_bytes())
    half = layers_of(copied, spec)
    # of the last layer only the values are used
    depth = len(mini.clip.clip.visual.transformer.resblocks)
    assert half["fused_attentions"] == depth
    for precision, kind in (("int8", "Int8"), ("fp8", "FP8")):
        quantized = layers_of(copied, spec, precision, graph_inputs.real(spec, 4))
        assert quantized["fused_attentions"] == depth
        # queries, keys and values in one; the projection; two of the perceptron
        assert products(quantized) == {f"gemm {kind}->Half": 4 * depth}


def test_fp8_is_refused_for_gpus_that_lack_it(
    specs: dict[str, GraphSpec],
    graph_inputs: GraphInputs,
    exported: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """And without a list the engine is for those that have it."""
    pytest.importorskip("tensorrt_rtx_bindings")
    spec, path = specs["clip_image_encoder"], tmp_path / "fp8.onnx"
    source = exported("clip_image_encoder")
    quantize(source, graph_inputs.real(spec, 2), path, REST[GPU], "fp8")
    with pytest.raises(ArtifactError, match=r"fp8 is for compute capability 8\.9"):
        build_engine(path, spec, tmp_path / "a.engine", "tensorrt-rtx", [86, 89])
    assert FP8_CAPABILITIES == (89, 120, 121)


def test_int8_of_sam_for_gpus_has_no_product_in_single_precision(
    mini: RegionSpot, specs: dict[str, GraphSpec], graph_inputs: GraphInputs, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    spec, path = specs["sam_image_encoder"], tmp_path / "sam.onnx"
    export_onnx(mini, spec, path, target=GPU)
    layers = layers_of(path, spec, "int8", graph_inputs.real(spec, 4))
    depth = len(mini.sam.sam.image_encoder.blocks)
    assert layers["fused_attentions"] == depth
    assert products(layers)["gemm Int8->Half"] == 4 * depth
    assert not any("Float" in kind for kind in products(layers)), layers["types"]
