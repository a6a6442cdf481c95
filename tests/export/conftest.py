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
from regionspot.modeling.graphs import model_info
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
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
    mini: RegionSpot, specs: dict[str, GraphSpec], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A graph's name to its file in single precision. Tracing takes seconds: read it, don't change
    it.
    """
    folder = tmp_path_factory.mktemp("onnx")

    def path_of(graph: str) -> Path:
        path = folder / f"{graph}.onnx"
        if not path.exists():
            export_onnx(mini, specs[graph], path, {"preprocessing": "tested"})
        return path

    return path_of
