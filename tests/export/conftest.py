"""regionspot_mini, its graphs as ONNX files, each made once for the whole run, and inputs for
them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from regionspot.export.graph_inputs import GraphInputs
from regionspot.export.onnx_graph import export_onnx
from regionspot.export.pictures import load_pictures
from regionspot.locks import locked
from regionspot.modeling.graphs import model_info
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.artifacts import Manifest
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.graphs import graph_specs


@pytest.fixture(scope="session")
def mini() -> RegionSpot:
    return create_model("regionspot_mini")


@pytest.fixture(scope="session")
def specs(mini: RegionSpot) -> dict[str, GraphSpec]:
    return graph_specs(model_info(mini))


@pytest.fixture(scope="session")
def graph_inputs(mini: RegionSpot) -> GraphInputs:
    """Real ones from 12 pictures."""
    return GraphInputs(mini, load_pictures(None, 12))


@pytest.fixture(scope="session")
def exported(
    mini: RegionSpot,
    specs: dict[str, GraphSpec],
    mini_artifacts_with_masks: Path,
    run_directory: Path,
) -> Callable[[str], Path]:
    """A graph's name to its file in single precision. Tracing takes seconds, so all processes of a
    run share the files, and those of `mini_artifacts_with_masks` are taken: read them, don't
    change them.
    """
    manifest = Manifest.load(mini_artifacts_with_masks)
    folder = run_directory / "onnx"
    folder.mkdir(exist_ok=True)

    def path_of(graph: str) -> Path:
        if (entry := manifest.get(graph, "onnx", "fp32")) is not None:
            return manifest.verify(entry)
        path = folder / f"{graph}.onnx"
        with locked(folder / f"{graph}.lock"):
            if not path.exists():
                metadata = {"preprocessing": manifest.preprocessing.fingerprint()}
                export_onnx(mini, specs[graph], path, metadata)
        return path

    return path_of
