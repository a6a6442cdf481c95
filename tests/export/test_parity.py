"""The comparison itself: which outputs are a pass, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from regionspot.errors import ArtifactError
from regionspot.export.parity import compare, compare_pipeline, unavailable_reason
from regionspot.export.parity_inputs import Trial
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.tolerance import HALF, INT8, RUNTIME_FP32

SPEC = GraphSpec(
    "double",
    "twice its input",
    (TensorSpec("x", "float32", ("batch", 4)),),
    (TensorSpec("y", "float32", ("batch", 4)), TensorSpec("total", "float32", ("batch",))),
    {"batch": Range(1, 2, 8)},
)


def trial(batch: int, real: bool = True) -> Trial:
    x = np.random.default_rng(batch).normal(size=(batch, 4)).astype(np.float32)
    return Trial({"x": x}, {"y": 2 * x, "total": x.sum(1)}, real)


def test_equal_outputs_pass() -> None:
    trials = [trial(1, real=False), trial(3)]
    parity = compare(SPEC, trials, [one.expected for one in trials], RUNTIME_FP32)
    assert parity.passed is True and parity.reason == ""
    assert set(parity.outputs) == {"y", "total"}
    assert parity.worst is not None and parity.worst.max_abs_diff == 0.0


def test_the_output_that_differs_is_named() -> None:
    one = trial(2)
    parity = compare(
        SPEC, [one], [{"y": one.expected["y"], "total": one.expected["total"] + 0.1}], RUNTIME_FP32
    )
    assert parity.passed is False
    assert parity.reason.startswith("total: max|Δ| 0.1 is ") and parity.reason.endswith(" > 0.0001")
    assert parity.worst is not None and parity.worst.max_abs_diff == pytest.approx(0.1)


def test_the_worst_of_all_trials_counts() -> None:
    good, bad = trial(2), trial(3)
    noisy = {name: array + np.float32(0.5) for name, array in bad.expected.items()}
    assert compare(SPEC, [bad, good], [noisy, good.expected], HALF).passed is False


def test_int8_is_judged_on_real_inputs_but_must_run_on_all() -> None:
    seeded, real = trial(2, real=False), trial(3)
    noise = {name: -array for name, array in seeded.expected.items()}
    assert compare(SPEC, [seeded, real], [noise, real.expected], INT8).passed is True
    noise["y"] = np.full_like(noise["y"], np.nan)
    with pytest.raises(ArtifactError, match=r"100\.0% of y is NaN"):
        compare(SPEC, [seeded, real], [noise, real.expected], INT8)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"y": np.zeros((2, 4), np.float32)}, "its outputs are y, not y, total"),
        (
            {"z": np.zeros((2, 4), np.float32), "total": np.zeros(2, np.float32)},
            "its outputs are total, z, not y, total",
        ),
        (
            {"y": np.zeros((2, 4), np.float16), "total": np.zeros(2, np.float32)},
            r"y came out as float16 \(2, 4\) instead of float32 \(2, 4\)",
        ),
        (
            {"y": np.zeros((1, 4), np.float32), "total": np.zeros(2, np.float32)},
            r"y came out as float32 \(1, 4\) instead of float32 \(2, 4\)",
        ),
        (
            {"y": np.full((2, 4), np.inf, np.float32), "total": np.zeros(2, np.float32)},
            "100.0% of y is NaN or infinite",
        ),
    ],
)
def test_outputs_that_are_none(outputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        compare(SPEC, [trial(2)], [outputs], HALF)


def pipeline_trial(logits: list[list[float]], valid: list[bool]) -> Trial:
    return Trial({"valid": np.array([valid])}, {"logits": np.array([logits], np.float32)}, True)


def test_pipelines_agree_region_by_region() -> None:
    one = pipeline_trial(
        [[5.0, 0.0], [0.0, 5.0], [5.0, 0.0], [9.0, 9.0]], [True, True, True, False]
    )
    swapped = {"logits": one.expected["logits"] * np.array([[[1], [1], [-1], [-1]]], np.float32)}
    whole = compare_pipeline([one], [swapped], INT8)
    assert (whole.images, whole.regions, whole.top1_agreement) == (1, 3, pytest.approx(2 / 3))
    assert whole.score_difference is not None and whole.score_difference > 0.9
    assert whole.passed is False and whole.reason == "top-1 agreement 0.6667 < 0.9"
    assert compare_pipeline([one], [one.expected], RUNTIME_FP32).passed is True


def test_either_of_two_equal_classes_may_come_first() -> None:
    one = pipeline_trial([[1.0, 1.0 + 1e-6, 0.0]], [True])
    assert (
        compare_pipeline(
            [one], [{"logits": np.array([[[1.0 + 1e-6, 1.0, 0.0]]], np.float32)}], RUNTIME_FP32
        ).passed
        is True
    )


def test_a_pipeline_that_gives_nan() -> None:
    one = pipeline_trial([[1.0, 0.0]], [True])
    with pytest.raises(ArtifactError, match="not finite"):
        compare_pipeline([one], [{"logits": np.full((1, 1, 2), np.nan, np.float32)}], RUNTIME_FP32)


def test_a_probability_that_is_off_breaches_single_precision() -> None:
    one = pipeline_trial([[1.0, 0.0]], [True])
    whole = compare_pipeline(
        [one],
        [{"logits": one.expected["logits"] + np.array([[[0.1, 0]]], np.float32)}],
        RUNTIME_FP32,
    )
    assert whole.passed is False and whole.reason.startswith("score difference")
    lenient = replace(RUNTIME_FP32, max_score_difference=None)
    assert compare_pipeline([one], [{"logits": one.expected["logits"]}], lenient).passed is True


def test_what_runs_anywhere() -> None:
    assert (
        unavailable_reason("onnxruntime", "fp16") is None
        and unavailable_reason("openvino", "int8") is None
    )


def test_engines_without_a_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no NVIDIA GPU" in str(unavailable_reason("tensorrt-rtx", "fp32"))
