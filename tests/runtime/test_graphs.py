"""The register of graphs, and a graph that a package outside of regionspot adds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from regionspot.errors import InputError
from regionspot.modeling.graphs import GraphModule, module_class
from regionspot.runtime.graphs import (
    GRAPHS,
    Role,
    graph_named,
    register_graph,
    required_graphs,
    served_graphs,
)
from tests.plugins import install_page, run_command


def test_every_row_names_a_module() -> None:
    assert all(issubclass(module_class(name), GraphModule) for name in GRAPHS)


def test_required_graphs_are_served_first_and_combined_ones_not_at_all() -> None:
    assert served_graphs()[: len(required_graphs())] == required_graphs()
    assert set(GRAPHS) - set(served_graphs()) == {
        name for name in GRAPHS if graph_named(name).role is Role.COMBINED
    }
    assert graph_named("region_recognizer").role is Role.COMBINED


def test_a_name_is_registered_once() -> None:
    with pytest.raises(InputError, match="there is a graph 'region_head' already"):
        register_graph(GRAPHS["region_head"])


class TestPlugIn:
    """The code of the how-to page, installed as a package of its own."""

    @pytest.fixture
    def installed(self, tmp_path: Path) -> dict[str, str]:
        return install_page("how-to/add-a-graph.md", tmp_path)

    def test_it_is_exported_verified_and_run(
        self, installed: dict[str, str], tmp_path: Path
    ) -> None:
        out = tmp_path / "artifacts"
        graphs = "clip_pooled"
        options = [
            "--onnx",
            "--openvino",
            "--graphs",
            graphs,
            "--precision",
            "fp32,int8",
            "--parity-images",
            "1",
        ]
        made = run_command(installed, "export", "--out", str(out), *options)
        assert made.returncode == 0, made.stdout + made.stderr
        entries = json.loads((out / "manifest.json").read_text())["graphs"]
        own = [entry for entry in entries if entry["name"] == "clip_pooled"]
        assert {(entry["format"], entry["precision"]) for entry in own} == {
            (made_as, precision)
            for made_as in ("onnx", "openvino")
            for precision in ("fp32", "int8")
        }
        assert all(entry["passed"] is True and entry["outputs_measured"] for entry in own)

        code = """
import sys
import numpy as np
from pooled import pooled_features
from regionspot import create_model
from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.runtime.opening import open_pipeline
from regionspot.runtime.graphs import served_graphs

reference = pipeline_from_model(create_model("regionspot_mini"))
images = np.random.default_rng(0).integers(0, 256, (2, 192, 192, 3), np.uint8)
maps = reference.encode_clip(images)
wanted = pooled_features(reference, maps)
with open_pipeline(sys.argv[1], "openvino", "fp32") as pipeline:
    found = pooled_features(pipeline, maps)

print(wanted.shape == (2, maps.shape[2]), np.abs(found - wanted).max() < 1e-4, served_graphs()[-1])
"""
        ran = subprocess.run(
            [sys.executable, "-c", code, str(out)], env=installed, capture_output=True, text=True
        )
        assert ran.stdout.split() == ["True", "True", "clip_pooled"], ran.stderr

    def test_its_size_is_estimated(self, installed: dict[str, str], tmp_path: Path) -> None:
        planned = run_command(
            installed,
            "export",
            "--out",
            str(tmp_path / "none"),
            "--graphs",
            "clip_pooled",
            "--dry-run",
        )
        assert "clip_pooled" in planned.stdout and "1 artefacts" in planned.stdout, planned.stderr
