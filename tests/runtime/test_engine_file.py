"""An engine and its sidecar on disk: what is refused, and why. Needs no TensorRT."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regionspot.errors import ArtifactError, InputError
from regionspot.runtime.engine_file import (
    FLAVOURS,
    BuildHost,
    EngineSidecar,
    EngineTensor,
    profile_of,
    read_engine,
    read_sidecar,
    sidecar_path,
    write_engine,
)
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec

PLAN = b"the bytes of an engine" * 40
SPEC = GraphSpec(
    "region_head",
    "",
    (
        TensorSpec("valid", "bool", ("batch", "regions")),
        TensorSpec("words", "float32", ("words", 8)),
    ),
    (TensorSpec("logits", "float32", ("batch", "regions", "words")),),
    {"batch": Range(1, 2, 8), "regions": Range(1, 32, 300), "words": Range(5, 5, 5)},
)
SIDECAR = EngineSidecar(
    graph="region_head",
    flavour="tensorrt-rtx",
    file="region_head.engine",
    size_bytes=len(PLAN),
    sha256=hashlib.sha256(PLAN).hexdigest(),
    versions={"tensorrt_rtx_bindings": "1.7.1.116"},
    compute_capabilities=(89, 120),
    device=None,
    optimization_level=3,
    workspace_mib=None,
    build_s=1.5,
    inputs=(
        EngineTensor("valid", "bool", (-1, -1), ((1, 1), (2, 32), (8, 300))),
        EngineTensor("words", "float32", (5, 8), ((5, 8), (5, 8), (5, 8))),
    ),
    outputs=(EngineTensor("logits", "float32", (-1, -1, 5)),),
    onnx={"region_head.onnx": "0" * 64},
    warnings=("a warning",),
)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "made" / "region_head.engine"
    write_engine(path, PLAN, SIDECAR)
    return path


def test_what_is_written_is_read(engine: Path) -> None:
    assert read_engine(engine, SPEC, "tensorrt-rtx") == (PLAN, SIDECAR)
    assert engine.read_bytes() == PLAN, "nothing in front of the plan"
    assert sorted(path.name for path in engine.parent.iterdir()) == [
        "region_head.engine",
        "region_head.json",
    ]


def test_where_it_was_built_and_where_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "region_head.plan"
    sidecar = replace(
        SIDECAR,
        flavour="tensorrt",
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        built_on=BuildHost(89, "580.95.05", None),
    )
    write_engine(path, PLAN, sidecar)
    assert read_sidecar(path) == sidecar


def test_a_sidecar_from_before_these_were_written(engine: Path) -> None:
    content = json.loads(sidecar_path(engine).read_text())
    for name in ("version_compatible", "hardware_compatibility", "built_on"):
        del content[name]
    sidecar_path(engine).write_text(json.dumps(content))
    assert read_sidecar(engine) == SIDECAR


def test_profile() -> None:
    assert profile_of(SPEC) == {"valid": ((1, 1), (2, 32), (8, 300)), "words": ((5, 8),) * 3}


def test_the_other_flavours_engine(engine: Path) -> None:
    with pytest.raises(
        InputError, match=r"engine of TensorRT-RTX, which TensorRT cannot run.*runtime tensorrt-rtx"
    ):
        read_engine(engine, SPEC, "tensorrt")
    with pytest.raises(InputError, match="choose one of tensorrt, tensorrt-rtx"):
        read_engine(engine, SPEC, "openvino")


@pytest.mark.parametrize("content", [PLAN[:-1], PLAN[:100] + b"?" + PLAN[101:], b""])
def test_a_damaged_engine(engine: Path, content: bytes) -> None:
    engine.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"region_head\.engine is damaged, or not the engine"):
        read_engine(engine, SPEC, "tensorrt-rtx")


def test_half_of_the_pair(engine: Path) -> None:
    engine.unlink()
    with pytest.raises(ArtifactError, match=r"cannot read the engine .*No such file"):
        read_engine(engine, SPEC, "tensorrt-rtx")
    sidecar_path(engine).unlink()
    with pytest.raises(ArtifactError, match=r"region_head\.json.*copy both"):
        read_engine(engine, SPEC, "tensorrt-rtx")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("sha256"),
        lambda content: content.update(format=2),
        lambda content: content.update(flavour="trt"),
        lambda content: content.update(inputs=[{"name": "valid"}]),
        lambda content: content.update(inputs=None),
        lambda content: content.update(surprise=1),
        lambda content: content.update(hardware_compatibility="turing_plus"),
        lambda content: content.update(built_on={"gpu": "L4"}),
    ],
)
def test_a_foreign_sidecar(engine: Path, change: Any) -> None:
    content = json.loads(sidecar_path(engine).read_text())
    change(content)
    sidecar_path(engine).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"region_head\.json is not an engine's sidecar"):
        read_sidecar(engine)


@pytest.mark.parametrize("text", ["", "[]", "1", '{"format": 1', "\x00"])
def test_a_damaged_sidecar(engine: Path, text: str) -> None:
    sidecar_path(engine).write_text(text)
    with pytest.raises(ArtifactError, match=r"region_head\.json is not an engine's sidecar"):
        read_sidecar(engine)


def test_another_graphs_engine(engine: Path) -> None:
    with pytest.raises(ArtifactError, match="is the graph region_head, not clip_text_encoder"):
        read_engine(engine, replace(SPEC, name="clip_text_encoder"), "tensorrt-rtx")
    renamed = replace(
        SPEC, outputs=(TensorSpec("scores", "float32", ("batch", "regions", "words")),)
    )
    with pytest.raises(ArtifactError, match="output scores is missing; output logits is unknown"):
        read_engine(engine, renamed, "tensorrt-rtx")
    narrow = replace(SPEC, ranges={**SPEC.ranges, "words": Range(1, 5, 9)})
    with pytest.raises(
        ArtifactError, match=r"words is float32 \(5, 8\) instead of float32 \(words, 8\)"
    ):
        read_engine(engine, narrow, "tensorrt-rtx")


def test_a_new_engine_is_never_beside_an_old_sidecar(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regionspot.runtime.engine_file.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        write_engine(engine, PLAN + b"new", SIDECAR)
    assert not sidecar_path(engine).exists() and engine.read_bytes() == PLAN


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_engine(tmp_path / "file" / "region_head.engine", PLAN, SIDECAR)


def test_how_to_install_is_said() -> None:
    assert "https://pypi.nvidia.com" in FLAVOURS["tensorrt"].install
    assert "tensorrt_rtx-cu13-libs" in FLAVOURS["tensorrt-rtx"].install
