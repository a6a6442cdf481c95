"""PyTorch and ONNX Runtime on a GPU; TensorRT's tests stand in test_trt_runner.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.opening import open_pipeline
from regionspot.runtime.ort_runner import OrtRunner, best_device
from regionspot.runtime.pipeline import RegionPipeline
from tests.runtime import gpu_checks
from tests.runtime.test_runners import expected_of, feeds_of, fixed_size_file

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module", params=["torch", "torch compiled", "onnxruntime"])
def on_gpu(request: pytest.FixtureRequest, artifacts: Path) -> Iterator[RegionPipeline]:
    if request.param == "onnxruntime":
        if best_device() != DEVICE:
            pytest.skip("this ONNX Runtime has no CUDA provider that starts here")
        pipeline = open_pipeline(artifacts, "onnxruntime", "fp32", device=DEVICE)
    else:
        model = create_model("regionspot_mini", device=DEVICE)
        pipeline = pipeline_from_model(model, compiled=request.param == "torch compiled")
    with pipeline:
        yield pipeline


def test_predictions(on_gpu: RegionPipeline, model: RegionSpot) -> None:
    gpu_checks.check_predictions(on_gpu, model)


def test_largest_sizes(on_gpu: RegionPipeline, model: RegionSpot) -> None:
    gpu_checks.check_largest_sizes(on_gpu, model)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_onnx_runtime_keeps_tensors_on_the_gpu(tmp_path: Path, cuda_graph: bool) -> None:
    """With and without fixed buffers and a captured CUDA graph; three runs of different feeds."""
    if best_device() != DEVICE:
        pytest.skip("this ONNX Runtime has no CUDA provider that starts here")
    path, spec = fixed_size_file(tmp_path)
    with OrtRunner(path, spec, DEVICE, cuda_graph=cuda_graph) as runner:
        assert runner.waits_for_gpu
        kept = []
        for seed in range(3):
            feeds = feeds_of(2, 4, seed)
            outputs = runner.infer(feeds, keep=["more"])
            np.testing.assert_allclose(outputs["y"], expected_of(feeds), atol=1e-4)
            assert outputs["more"].device_name() == "cuda"
            kept.append((feeds, outputs["more"]))
        for feeds, counts in kept:  # later runs have not changed them
            again = runner.infer({**feeds, "counts": counts})
            np.testing.assert_array_equal(again["more"], feeds["counts"] + 2)
