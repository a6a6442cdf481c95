"""SAM's attention by our own kernel inside OpenVINO: found where it is meant to be, and equal."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from regionspot.modeling.graphs import model_sizes
from regionspot.modeling.presets import create_model
from regionspot.runtime import openvino_attention
from regionspot.runtime.graphs import graph_specs
from regionspot.runtime.openvino_attention import GridAttention, use_own_attention
from regionspot.runtime.openvino_operation import NativeOperations
from regionspot.runtime.openvino_runner import OpenVinoRunner
from tests.runtime.conftest import Encode

GRAPH = "sam_image_encoder"


@pytest.fixture
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_attention, "LARGE", 0)


def replaced(model: openvino.Model) -> list[Any]:
    operations = NativeOperations()
    use_own_attention(model, operations)
    return operations.alive


def test_equal_to_openvinos_own(
    sam_encoder: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = encode(sam_encoder)
    monkeypatch.setattr(openvino_attention, "LARGE", 0)
    for threads in (1, 2):
        np.testing.assert_allclose(
            encode(sam_encoder, threads), theirs, atol=2e-5 * np.abs(theirs).max()
        )


@pytest.mark.usefixtures("at_any_size")
def test_every_layer_is_found_once(sam_encoder: Path) -> None:
    blocks = create_model("regionspot_mini").sam.sam.image_encoder.blocks
    # global layers and windows
    assert {block.window_size == 0 for block in blocks} == {True, False}
    model = openvino.Core().read_model(sam_encoder)
    kept = replaced(model)
    assert len(kept) == len(blocks)
    assert not replaced(model)
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert "Softmax" not in kinds and kinds.count("GridAttention") == len(blocks)


@pytest.mark.usefixtures("at_any_size")
def test_heads_one_by_one(encode: Encode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As large global layers are exported."""
    from regionspot.export.onnx_graph import export_onnx
    from regionspot.modeling import image_encoder

    monkeypatch.setattr(image_encoder, "LARGE", 1 << 17)
    model = create_model("regionspot_mini")
    export_onnx(model, graph_specs(model_sizes(model))[GRAPH], tmp_path / "graph.onnx", {})
    read = openvino.Core().read_model(tmp_path / "graph.onnx")
    blocks = model.sam.sam.image_encoder.blocks
    kinds = [node.get_type_name() for node in read.get_ordered_ops()]
    assert kinds.count("Softmax") > len(blocks)
    assert len(replaced(read)) == len(blocks)
    monkeypatch.setattr(openvino_attention, "LARGE", 1 << 30)
    theirs = encode(tmp_path / "graph.onnx")
    monkeypatch.setattr(openvino_attention, "LARGE", 0)
    np.testing.assert_allclose(
        encode(tmp_path / "graph.onnx"), theirs, atol=2e-5 * np.abs(theirs).max()
    )


def test_small_images_stay(sam_encoder: Path) -> None:
    assert not replaced(openvino.Core().read_model(sam_encoder))


@pytest.mark.usefixtures("at_any_size")
def test_what_is_something_else_stays(sam_encoder: Path, mini_artifacts: Path) -> None:
    for other in (
        "clip_image_encoder",
        "sam_token_decoder_prompts",
        "region_head",
        "clip_text_encoder",
    ):
        path = mini_artifacts / "onnx" / "fp32" / f"{other}.onnx"
        assert not replaced(openvino.Core().read_model(path))
    model = openvino.Core().read_model(sam_encoder)
    weights = [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"]
    model.add_outputs([node.output(0) for node in weights])  # something else reads them
    assert not replaced(model)


@pytest.mark.usefixtures("at_any_size")
def test_nothing_is_left_behind(sam_encoder: Path) -> None:
    """OpenVINO never lets go of an operation in Python, and copies it for each run of a graph of no
    fixed size.
    """

    def alive() -> int:
        gc.collect()
        return sum(isinstance(found, GridAttention) for found in gc.get_objects())

    spec = graph_specs(model_sizes(create_model("regionspot_mini")))[GRAPH]
    before = alive()
    with OpenVinoRunner(sam_encoder, spec, threads=1) as runner:
        opened = alive()
        assert opened > before
        for batch in (1, 2, 3, 1, 2):
            images = np.zeros((batch, 256, 256, 3), np.uint8)
            runner.infer({"images": images, "input_sizes": np.full((batch, 2), 256, np.int32)})
        assert alive() == opened
    assert alive() == before
