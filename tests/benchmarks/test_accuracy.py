"""`regionspot-benchmark accuracy`: figures of the evaluator, and honest distances."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from regionspot.benchmarks.accuracy import best_classes
from regionspot.cli.main import main
from regionspot.evaluation.detections import Detections


def test_onnx_runtime_beside_torch(
    mini_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accuracy.json"
    command = [
        "benchmark",
        "accuracy",
        "--artifacts",
        str(mini_artifacts),
        "--count",
        "12",
        "--json",
        str(path),
    ]
    assert main([*command, "--fail-if", "dAP>0.1", "--fail-if", "agreement<0.99"]) == 0
    report = json.loads(path.read_text())
    torch, onnx = report["rows"]
    assert (torch["runtime"], torch["dAP"], torch["agreement"], torch["classes"]) == (
        "torch",
        0,
        1,
        {},
    )
    assert onnx["runtime"] == "onnxruntime" and onnx["AP"] == pytest.approx(torch["AP"], abs=0.1)
    assert 0 < onnx["max_score_difference"] < 1e-4, "another runtime's last digits differ"
    assert report["conditions"]["protocol"]["images"] == 12
    assert main([*command, "--fail-if", "AP>0"]) == 1
    assert "AP>0 holds of accuracy torch fp32" in capsys.readouterr().err


def test_best_class_of_a_region() -> None:
    boxes = np.array([[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1]], float)
    scores = np.array([0.5, 0.4, 0.7, 0.1])
    found = best_classes(Detections(np.array([7, 7, 7, 8]), np.array([1, 2, 3, 4]), boxes, scores))
    assert found[7, boxes[0].tobytes()] == (3, 0.7)
    assert found[7, boxes[1].tobytes()] == (2, 0.4)
    assert found[8, boxes[0].tobytes()] == (4, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to compare"),
        (["--count", "0"], "--count"),
        (["--model", "regionspot_bb"], "needs regionspot_bb's weights"),
    ],
)
def test_what_cannot_be_measured(
    options: list[str], message: str, mini_artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts = ["--artifacts", str(mini_artifacts)] if "--count" in options else []
    assert main(["benchmark", "accuracy", *artifacts, *options]) == 2
    assert message in capsys.readouterr().err
