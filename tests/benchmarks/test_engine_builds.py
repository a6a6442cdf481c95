"""The benchmark of engine builds: what its JSON holds, and a build that fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regionspot.benchmarks.engine_builds import main

pytest.importorskip("tensorrt_rtx_bindings")


def test_figures_and_their_conditions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model",
        "regionspot_mini",
        "--graphs",
        "sam_token_decoder_image",
        "--precision",
        "fp16,fp32",
    ]
    assert main([*options, "--json", str(tmp_path / "builds.json")]) == 0
    results = json.loads((tmp_path / "builds.json").read_text())
    assert {"commit", "cpus", "processor", "tensorrt_rtx-cu13-bindings"} <= results[
        "conditions"
    ].keys()
    assert all(word in results["command"] for word in options)
    rows = results["engines"]
    assert [(row["graph"], row["precision"]) for row in rows] == [
        ("sam_token_decoder_image", "fp32"),
        ("sam_token_decoder_image", "fp16"),
    ]
    for row in rows:
        assert (
            row["engine_bytes"] > row["onnx_bytes"] > 0
            and row["build_s"] > 0
            and row["compute_capabilities"]
        )
        assert row["profile"]["image_embeddings"][2][0] == 8, "the default ranges"
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    "option", [["--graphs", "sam"], ["--precision", "fp8"], ["--model", "regionspot_xl"]]
)
def test_what_there_is_not(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "regionspot_mini", *option]) == 2
    assert capsys.readouterr().err.startswith("error: ")
