"""OpenVINO's IR: what the ONNX file computes, under the same names, in files of its precision's
size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import openvino
import pytest

from regionspot.errors import ArtifactError
from regionspot.export.graph_inputs import GraphInputs
from regionspot.export.openvino_ir import convert
from regionspot.export.precision import write_half
from regionspot.export.quantization import quantize
from regionspot.modeling.graphs import graph_module
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.formats import FORMATS
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.openvino_runner import OpenVinoRunner
from regionspot.runtime.tolerance import measure
from regionspot.runtime.torch_runner import TorchRunner

# of the weights, beside those of the ONNX file
SIZE = {"fp32": 1.05, "fp16": 0.55, "bf16": 0.55, "int8": 0.35}


@pytest.mark.parametrize("precision", SIZE)
@pytest.mark.parametrize("graph", ["clip_image_encoder", "region_head"])
def test_every_precision(
    mini: RegionSpot,
    specs: dict[str, GraphSpec],
    graph_inputs: GraphInputs,
    exported: Callable[[str], Path],
    tmp_path: Path,
    graph: str,
    precision: str,
) -> None:
    spec, source = specs[graph], tmp_path / "source.onnx"
    if precision == "fp32":
        source = exported(graph)
    elif precision == "int8":
        quantize(exported(graph), graph_inputs.real(spec)[2:], source)
    else:
        write_half(exported(graph), source, precision)
    out = tmp_path / "ir" / f"{graph}.xml"
    convert(source, out, precision)
    assert sorted(path.name for path in out.parent.iterdir()) == [f"{graph}.bin", f"{graph}.xml"]
    # int8 leaves the head as it is
    size = SIZE["fp32" if (graph, precision) == ("region_head", "int8") else precision]
    assert out.with_suffix(".bin").stat().st_size < size * exported(graph).stat().st_size
    assert (
        openvino.Core().read_model(out).get_rt_info(["regionspot", "precision"]).value == precision
    )
    with (
        OpenVinoRunner(out, spec, threads=1) as runner,
        TorchRunner(graph_module(mini, graph), spec) as reference,
    ):
        for feed in (graph_inputs.seeded(spec, 1), *graph_inputs.real(spec, 2)):
            wanted = reference.infer(feed)
            for name, array in runner.infer(feed).items():
                assert (
                    not FORMATS["openvino"]
                    .tolerance(precision)
                    .breaches(measure(wanted[name], array))
                )


def test_again_replaces(exported: Callable[[str], Path], tmp_path: Path) -> None:
    for graph in ("region_head", "sam_token_decoder_image"):
        convert(exported(graph), tmp_path / "a.xml", "fp32")
    names = {
        name
        for value in openvino.Core().read_model(tmp_path / "a.xml").inputs
        for name in value.names
    }
    assert names == {"image_embeddings"} and len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        convert(tmp_path / "absent.onnx", tmp_path / "a.xml", "fp32")
    (tmp_path / "damaged.onnx").write_bytes(b"\x08\x0a" + bytes(100))
    with pytest.raises(ArtifactError, match=r"cannot read .*damaged\.onnx"):
        convert(tmp_path / "damaged.onnx", tmp_path / "a.xml", "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.onnx"]
