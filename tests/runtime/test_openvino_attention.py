"""SAM's global attention by our own kernel inside OpenVINO: found where it is meant to be, and equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import pytest

from regionspot.modeling.graphs import model_sizes
from regionspot.modeling.presets import create_model
from regionspot.runtime import openvino_attention
from regionspot.runtime.graph_spec import graph_specs
from regionspot.runtime.openvino_attention import use_own_attention
from regionspot.runtime.openvino_runner import OpenVinoRunner

GRAPH = "sam_image_encoder"


@pytest.fixture
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_attention, "LARGE", 0)


def encoded(path: Path, threads: int = 2) -> np.ndarray:
    images = np.random.default_rng(1).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    sizes = np.array([[256, 256], [144, 256]], np.int32)
    spec = graph_specs(model_sizes(create_model("regionspot_mini")))[GRAPH]
    with OpenVinoRunner(path, spec, threads=threads) as runner:
        return np.asarray(runner.infer({"images": images, "input_sizes": sizes})["image_embeddings"])


@pytest.fixture
def graph(mini_artifacts: Path) -> Path:
    return mini_artifacts / "onnx" / "fp32" / f"{GRAPH}.onnx"


def test_equal_to_openvinos_own(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = encoded(graph)
    monkeypatch.setattr(openvino_attention, "LARGE", 0)
    for threads in (1, 2):
        np.testing.assert_allclose(encoded(graph, threads), theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.usefixtures("at_any_size")
def test_every_global_layer_and_no_window(graph: Path) -> None:
    blocks = create_model("regionspot_mini").sam.sam.image_encoder.blocks
    model = openvino.Core().read_model(graph)
    assert use_own_attention(model, 1) == sum(block.window_size == 0 for block in blocks) > 0
    assert use_own_attention(model, 1) == 0


def test_small_layers_stay(graph: Path) -> None:
    assert use_own_attention(openvino.Core().read_model(graph), 1) == 0


@pytest.mark.usefixtures("at_any_size")
def test_scores_that_something_else_reads_stay(graph: Path) -> None:
    model = openvino.Core().read_model(graph)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Softmax":
            model.add_outputs([node.output(0)])
    assert use_own_attention(model, 1) == 0
