"""Our calls of TensorRT's Python API against the real modules of its oldest and newest versions.

Their modules are loaded over stub libraries, so this needs neither a GPU nor TensorRT itself, and
no function of theirs is called. pip downloads the two wheels, 2.4 MB, into build/, once: little
enough to do without a marker.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from regionspot.runtime.trt_library import OLDEST_TENSORRT
from tests.runtime.stub_libraries import NVINFER, NVINFER_PLUGIN, NVONNXPARSER, compile_library
from tests.runtime.trt_uses import (
    FILES,
    OBJECTS,
    ROOT,
    RTX_ONLY,
    all_uses,
    complaints,
    unknown_objects,
    uses_of,
)

HOME = ROOT / "build" / "tensorrt-bindings"
OLDEST, NEWEST = "tensorrt-cu12-bindings==10.9.0.34", "tensorrt-cu13-bindings==11.4.0.106"
MADE_UP = """
def build(trt, builder):
    network = builder.create_netwrk(1)
    config = builder.create_builder_config("fast")
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPCE, pool_size=1)
    config.set_timing_cache(None, ignore=True)
    trt.Runtime(log).deserialise(b"")
"""

needs_wheels = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("gcc"),
    reason="the stub libraries are for x86-64 Linux, and compiled by gcc",
)


def bindings(requirement: str) -> Path:
    """The folder of an unpacked wheel, from pip where it is not there yet."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = HOME / f"{requirement}-{tag}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        target = HOME / f"{requirement}-{tag}-wheel"
        subprocess.run([*command, "--dest", str(target), requirement], check=True)
        (path,) = target.glob("*.whl")
        with zipfile.ZipFile(path) as content:
            content.extractall(target / "content")
        (target / "content").rename(folder)
        shutil.rmtree(target)
    return folder


def over_stubs(requirement: str, folder: Path) -> dict[str, str]:
    """The environment in which the module of a wheel can be imported."""
    major = requirement.partition("==")[2].partition(".")[0]
    for name, source in {
        "libnvinfer": NVINFER,
        "libnvinfer_plugin": NVINFER_PLUGIN,
        "libnvonnxparser": NVONNXPARSER,
    }.items():
        compile_library(folder, f"{name}.so.{major}", source)
    return {"PYTHONPATH": str(bindings(requirement)), "LD_LIBRARY_PATH": str(folder)}


@needs_wheels
@pytest.mark.parametrize("requirement", [OLDEST, NEWEST])
def test_tensorrt_has_what_we_use(requirement: str, tmp_path: Path) -> None:
    if requirement == OLDEST and sys.version_info >= (3, 14):
        pytest.skip("TensorRT 10.9 has no wheel for this Python")
    uses = [use for use in all_uses() if not RTX_ONLY.match(use.name)]
    assert complaints(uses, "tensorrt_bindings", over_stubs(requirement, tmp_path)) == []


def test_tensorrt_rtx_has_what_we_use() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    assert complaints(all_uses(), "tensorrt_rtx_bindings") == []


def test_the_oldest_is_the_one_that_we_demand() -> None:
    assert OLDEST.partition("==")[2].startswith(".".join(map(str, OLDEST_TENSORRT)) + ".")


def test_names_and_arguments_that_do_not_exist_are_noticed() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    found = complaints(uses_of(MADE_UP, OBJECTS, "made_up.py"), "tensorrt_rtx_bindings")
    assert found[0] == "made_up.py:3: tensorrt_rtx_bindings has no Builder.create_netwrk"
    assert found[1].startswith("made_up.py:4: Builder.create_builder_config takes other arguments")
    assert found[2] == "made_up.py:5: tensorrt_rtx_bindings has no MemoryPoolType.WORKSPCE"
    assert found[3].startswith(
        "made_up.py:6: IBuilderConfig.set_timing_cache takes other arguments"
    )
    assert found[4] == "made_up.py:7: tensorrt_rtx_bindings has no Runtime.deserialise"
    assert len(found) == 5


@pytest.mark.parametrize("path", FILES)
def test_every_object_of_tensorrt_has_a_class(path: str) -> None:
    """What is used of it would not be looked up otherwise."""
    assert unknown_objects((ROOT / path).read_text(), FILES[path]) == []


def test_an_object_without_a_class_is_noticed() -> None:
    source = "def refit(trt, engine):\n    refitter = trt.Refitter(engine)\n    refitter.go()\n"
    assert unknown_objects(source, OBJECTS) == ["refit.refitter"]


def test_every_file_that_uses_tensorrt_is_read() -> None:
    others = [
        path.relative_to(ROOT).as_posix()
        for folder in ("regionspot", "export", "serving", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if "trt." in path.read_text()
    ]
    wrong = [path for path in others if path not in FILES and _uses_the_module(path)]
    assert wrong == []


def _uses_the_module(path: str) -> bool:
    return bool(uses_of((ROOT / path).read_text(), {}, path))
