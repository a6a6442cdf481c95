"""What decides that an artefact, or a verdict on several, is still true; and one export at a
time.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regionspot.errors import InputError
from regionspot.export import build
from regionspot.export.build import Settings
from regionspot.export.made_with import preprocessing_of
from regionspot.export.making import EngineOptions
from regionspot.export.parity_inputs import ParityInputs
from regionspot.export.plan import Step
from regionspot.locks import locked
from regionspot.modeling.graphs import model_info
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.artifacts import MANIFEST, GraphEntry, Manifest
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.graphs import required_graphs


@pytest.fixture
def manifest(mini: RegionSpot, specs: dict[str, GraphSpec], tmp_path: Path) -> Manifest:
    """Of a whole pipeline of IRs, whose files are nowhere."""
    graphs = []
    for name in required_graphs():
        files = {f"{name}.xml": "a" * 64, f"{name}.bin": "b" * 64}
        graphs.append(
            GraphEntry(specs[name], "openvino", "fp32", f"{name}.xml", files, passed=True)
        )
    return Manifest(
        tmp_path, model_info(mini), preprocessing_of(mini), "", (), graphs=tuple(graphs)
    )


@pytest.fixture
def a_build(mini: RegionSpot, tmp_path: Path) -> build._Build:
    return build._Build(mini, ParityInputs(mini, parity_images=1), Settings(tmp_path))


def test_a_verdict_on_a_pipeline_is_of_all_its_files(manifest: Manifest) -> None:
    entry = manifest.graphs[1]
    before = build._pipeline_fingerprint(manifest, "openvino", "fp32")
    assert before is not None
    other_weights = replace(entry, files={**entry.files, f"{entry.name}.bin": "c" * 64})
    assert build._pipeline_fingerprint(
        manifest.with_entry(other_weights), "openvino", "fp32"
    ) not in (None, before)
    not_made = manifest.with_entry(replace(entry, file=None, files={}))
    assert build._pipeline_fingerprint(not_made, "openvino", "fp32") is None


def test_an_engine_is_of_its_gpu(
    a_build: build._Build, specs: dict[str, GraphSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipes() -> list[str]:
        steps = [Step(specs["region_head"], kind, "fp32") for kind in ("tensorrt", "tensorrt-rtx")]
        return [a_build._recipe(step, "weights", {}) for step in steps]

    monkeypatch.setattr("regionspot.export.trt_engine.gpu_here", lambda: ("NVIDIA H200", "9.0"))
    before = recipes()
    monkeypatch.setattr("regionspot.export.trt_engine.gpu_here", lambda: ("NVIDIA L4", "8.9"))
    assert [a == b for a, b in zip(recipes(), before, strict=True)] == [False, True]


def test_an_engine_is_of_what_it_is_compatible_with(
    a_build: build._Build, specs: dict[str, GraphSpec]
) -> None:
    def recipes(**options: Any) -> list[str]:
        a_build.settings = replace(a_build.settings, engine=EngineOptions(**options))
        steps = [Step(specs["region_head"], kind, "fp32") for kind in ("tensorrt", "tensorrt-rtx")]
        return [a_build._recipe(step, "weights", {}) for step in steps]

    plain = recipes()
    later = recipes(version_compatible=True)
    ampere = recipes(hardware_compatibility="ampere_plus")
    assert len({plain[0], later[0], ampere[0]}) == 3
    assert plain[1] == later[1] == ampere[1], "TensorRT-RTX knows neither"


def test_a_recipe_has_all_files_of_its_source(
    a_build: build._Build, manifest: Manifest, specs: dict[str, GraphSpec]
) -> None:
    step = Step(
        specs["region_head"], "onnx", "fp16", Step(specs["region_head"], "openvino", "fp32")
    )
    found = set()
    for weights in ("b", "c"):
        files = {"region_head.xml": "a" * 64, "region_head.bin": weights * 64}
        a_build.manifest = manifest.with_entry(replace(manifest.graphs[-1], files=files))
        found.add(a_build._recipe(step, "weights", {}))
    assert len(found) == 2


@pytest.mark.parametrize("text", ["{", '{"format": "regionspot-artifacts-0"}'])
def test_a_manifest_that_is_unusable_is_begun_anew(
    mini: RegionSpot, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "regionspot")
    (tmp_path / MANIFEST).write_text(text)
    found = build._open_manifest(mini, lambda _: "", Settings(tmp_path))
    assert found.graphs == () and found.model.name == mini.name
    (line,) = caplog.messages
    assert f"{tmp_path / MANIFEST} is not usable" in line and "\n" not in line
    found.save()
    assert Manifest.load(tmp_path).graphs == ()


def test_a_second_export_into_a_directory_is_refused(mini: RegionSpot, tmp_path: Path) -> None:
    out = tmp_path / "new" / "artifacts"
    inputs = ParityInputs(mini, parity_images=1)
    with locked(out):
        with pytest.raises(InputError, match=f"another process is exporting into {out}: wait"):
            build.export(mini, [], inputs, Settings(out))
        assert not (out / MANIFEST).exists()
    assert build.export(mini, [], inputs, Settings(out)).entries == ()
