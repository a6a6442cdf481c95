"""regionspot_mini, its artefacts made once for the run, and pipelines over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regionspot.modeling.graphs import model_info
from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.artifacts import Manifest
from regionspot.runtime.graphs import Ranges, gpu_graph_specs, graph_specs
from regionspot.runtime.openvino_runner import OpenVinoRunner
from regionspot.runtime.ort_runner import OrtRunner
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.runtime.runner import Runner

OpenPipeline = Callable[..., RegionPipeline]
Encode = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def model() -> RegionSpot:
    return create_model("regionspot_mini")


@pytest.fixture(scope="session")
def artifacts(mini_artifacts_with_masks: Path) -> Path:
    return mini_artifacts_with_masks


@pytest.fixture(scope="session")
def open_pipeline(model: RegionSpot, artifacts: Path) -> OpenPipeline:
    """A function of a runtime, of ranges or the target to pretend the graphs were made for, and of
    how work is cut.
    """

    def open_it(
        runtime: str,
        ranges: Ranges | None = None,
        prompt_chunk: int = 32,
        for_gpu: bool = False,
        **steps: Any,
    ) -> RegionPipeline:
        if runtime == "torch":
            return pipeline_from_model(model)
        info = model_info(model)
        specs = gpu_graph_specs(info, ranges) if for_gpu else graph_specs(info, ranges)
        files = artifacts / "onnx" / "fp32"
        runner_class: type[OrtRunner] | type[OpenVinoRunner]
        runner_class = OrtRunner if runtime == "onnxruntime" else OpenVinoRunner

        def open_runner(graph: str) -> Runner:
            return runner_class(files / f"{graph}.onnx", specs[graph], threads=1)

        return RegionPipeline(
            model_info(model),
            open_runner,
            runtime=runtime,
            precision="fp32",
            fingerprint=lambda graph: f"{graph} in {runtime}",
            prompt_chunk=prompt_chunk,
            text_input=Manifest.load(artifacts).text_input,
            **steps,
        )

    return open_it


@pytest.fixture(scope="session")
def sam_encoder(mini_artifacts: Path) -> Path:
    """The file of SAM's image encoder."""
    return mini_artifacts / "onnx" / "fp32" / "sam_image_encoder.onnx"


@pytest.fixture(scope="session")
def encode(model: RegionSpot) -> Encode:
    """A function of such a file and of threads: what OpenVINO makes of two images by it, (2, C, h,
    w).
    """

    def encode_it(path: Path, threads: int = 2) -> np.ndarray:
        images = np.random.default_rng(1).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
        sizes = np.array([[256, 256], [144, 256]], np.int32)
        with OpenVinoRunner(
            path, graph_specs(model_info(model))["sam_image_encoder"], threads=threads
        ) as runner:
            return np.asarray(
                runner.infer({"images": images, "input_sizes": sizes})["image_embeddings"]
            )

    return encode_it
