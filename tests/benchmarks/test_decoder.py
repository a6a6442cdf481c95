"""The decoder benchmark runs as a user would run it, and what it compares computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from regionspot.benchmarks.decoder import main

VARIANTS = {
    "segment_anything",
    "tokens_only",
    "ours_torch",
    "ours_onnxruntime",
    "ours_openvino",
    "ours_native",
}


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "regionspot.benchmarks.decoder",
        "--model",
        "regionspot_mini",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_all_variants_agree(tmp_path: Path) -> None:
    run = benchmark(
        "--boxes",
        "9,2",
        "--prompt-chunk",
        "4",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "figures.json"),
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["2", "9", "conditions"]
    for count in ("2", "9"):
        row = figures[count]
        assert {f"{variant}_s" for variant in VARIANTS} <= set(row)
        assert set(row["peak_mb"]) == VARIANTS
        assert row["max_abs_diff"] < 1e-4
    assert {"processor", "commit", "torch", "threads", "precision"} <= set(figures["conditions"])
    assert all(variant in run.stdout for variant in VARIANTS)


@pytest.mark.parametrize("counts", ["", "0", "-1,2", "many", "1;2"])
def test_impossible_counts_are_refused_at_once(
    counts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "regionspot_mini", f"--boxes={counts}"]) == 2
    assert capsys.readouterr().err.startswith("error: --boxes")
