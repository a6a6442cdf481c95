"""The benchmark of masks runs as a user would run it, and both ways give the same masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regionspot.benchmarks.mask_encoding import WAYS, main


def test_both_ways_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--masks", "3", "--size", "211", "307", "--json", str(tmp_path / "figures.json")])
        == 0
    )
    report = json.loads((tmp_path / "figures.json").read_text())
    assert [row["logits"] for row in report["rows"]] == ["blobs", "noise"]
    for row in report["rows"]:
        assert row["different"] == 0
        assert all(row[f"{way}_s"] > 0 for way in WAYS)
    assert report["conditions"]["masks"] == 3
    assert len(capsys.readouterr().out.splitlines()) == 3
