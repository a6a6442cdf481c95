"""`regionspot-benchmark train`: every way of training is measured on the same pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regionspot.cli.main import main


def test_rows(mini_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.json"
    options = [
        "--artifacts",
        str(mini_artifacts),
        "--count",
        "5",
        "--batch-size",
        "2",
        "--steps",
        "2",
    ]
    assert main(["benchmark", "train", *options, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = [(row["what"], row["runtime"]) for row in report["rows"]]
    assert rows == [
        ("extraction", "torch fp32"),
        ("extraction", "onnxruntime fp32"),
        ("steps, features cached", "torch fp32"),
        ("steps, CLIP's maps anew", "torch fp32"),
        ("steps, nothing cached", "torch fp32"),
    ]
    assert [row["n"] for row in report["rows"]] == [5, 5, 4, 4, 4]
    for row in report["rows"]:
        assert row["images_per_s"] == pytest.approx(row["n"] / row["seconds"])
        assert row["regions_per_s"] > row["images_per_s"] > 0
    assert report["rows"][-1]["speedup"] == 1
    output = capsys.readouterr()
    assert "steps, nothing cached" in output.out and "measuring" not in output.out
    assert "measuring extraction by torch fp32\n" in output.err


@pytest.mark.parametrize("option", ["--count", "--batch-size", "--steps"])
def test_nothing_to_do(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "train", option, "0"]) == 2
    assert "must be 1 or more" in capsys.readouterr().err
