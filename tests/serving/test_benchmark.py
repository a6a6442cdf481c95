"""The serving benchmark against the real server: answers agree, figures are there, and a wrong
answer is told.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regionspot.benchmarks.serving import main
from regionspot.data.coco_json import CocoDataset
from regionspot.serving.client import RegionClient
from regionspot.serving.records import ServerRecord


def test_parity_and_latency(
    server: ServerRecord,
    mini_artifacts_with_masks: Path,
    dataset: CocoDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [
        "--url",
        server.ports.grpc_url,
        "--http-url",
        server.ports.http_url,
        "--requests",
        "6",
    ]
    command += ["--artifacts", str(mini_artifacts_with_masks), "--data", str(dataset.path)]
    assert main([*command, "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["parity"]) == {"gRPC", "HTTP"}
    for row in figures["parity"].values():
        assert row["pictures"] == len(dataset.images) and row["regions"] > 20
        assert row["same_classes"] and row["max_score_difference"] <= 1e-4
    measured = {(row["where"], row["picture"], row["concurrency"]) for row in figures["latency"]}
    triton = {
        ("Triton", picture, concurrency) for picture in ("new", "known") for concurrency in (1, 4)
    }
    assert measured == {("in process", "new", 1), ("in process", "known", 1), *triton}
    assert all(row["n"] >= 6 and 0 < row["p50_ms"] <= row["p99_ms"] for row in figures["latency"])
    assert {"processor", "commit", "runtime", "includes"} <= set(figures["conditions"])
    assert "the same" in capsys.readouterr().out

    original = RegionClient.recognize

    def wrong(self: RegionClient, image: bytes, boxes: list[list[float]], vocabulary: str):  # type: ignore[no-untyped-def]
        found = original(self, image, boxes, vocabulary)
        return replace(found, scores=found.scores + np.float32(0.01))

    monkeypatch.setattr(RegionClient, "recognize", wrong)
    assert main(command) == 1
