"""The registers of formats and runtimes, and a runtime that a package outside of regionspot
adds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from regionspot.errors import InputError
from regionspot.registers import load_object
from regionspot.runtime.formats import (
    FORMATS,
    MODEL,
    RUNTIMES,
    Runtime,
    export_option,
    open_graph,
    preferred_precisions,
    register,
    runtime_named,
)
from regionspot.runtime.graph_spec import GraphSpec
from tests.plugins import install_entry_points, install_page, run_command
from tests.test_imports import FENCES

ROOT = Path(__file__).resolve().parents[2]
GRAPH = "sam_token_decoder_image"


def test_rows_refer_to_each_other() -> None:
    for runtime in RUNTIMES.values():
        assert runtime.opens and set(runtime.opens) <= set(FORMATS)
    for row in FORMATS.values():
        assert row.name in RUNTIMES[row.runtime].opens
        assert row.made_from == MODEL or row.made_from in FORMATS
    options = [row.option for row in FORMATS.values() if row.option]
    assert len({*options}) == len(options)


def test_functions_that_rows_name_exist() -> None:
    names = [runtime.opener for runtime in RUNTIMES.values()]
    names += [name for row in FORMATS.values() for name in (row.maker, row.settings) if name]
    assert all(callable(load_object(name)) for name in names)


def test_every_extra_that_a_row_names_is_one_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    lists = [
        found
        for row in FORMATS.values()
        for found in re.findall(r"regionspot\[([\w,-]+)\]", row.install)
    ]
    assert lists and {extra for one in lists for extra in one.split(",")} <= set(extras)
    assert all(row.install for row in FORMATS.values() if row.modules)


def test_libraries_of_rows_have_their_place_among_the_fences() -> None:
    modules = [row.modules for row in FORMATS.values()] + [row.modules for row in RUNTIMES.values()]
    assert {module for of_row in modules for module in of_row} <= set(FENCES)


def test_the_documentation_names_every_option() -> None:
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    assert [
        row.option for row in FORMATS.values() if row.option and f"`--{row.option}`" not in page
    ] == []


def test_a_name_is_registered_once() -> None:
    with pytest.raises(InputError, match="there is a runtime 'onnxruntime' already"):
        register(RUNTIMES["onnxruntime"])


def test_kernels_that_replace_single_graphs_run_no_whole_model() -> None:
    assert runtime_named("native").name == "native"
    with pytest.raises(
        InputError, match=r"no runtime 'native' for artefacts: choose onnxruntime, openvino"
    ):
        runtime_named("native", whole_models=True)


@pytest.mark.parametrize(
    ("runtime", "device"),
    [("openvino", "cuda"), ("native", "cuda"), ("tensorrt", "cpu"), ("tensorrt-rtx", "cuda:x")],
)
def test_a_device_that_the_runtime_does_not_have_is_refused(
    runtime: str, device: str, tmp_path: Path
) -> None:
    spec = GraphSpec("none", "", (), (), {})
    with pytest.raises(
        InputError, match=rf"the runtime {runtime} works on auto, c[\w:, ]+, not on {device}$"
    ):
        open_graph(tmp_path / "none", spec, runtime, "fp32", device)


def test_devices_with_a_number() -> None:
    row = Runtime("some", ("onnx",), "some:open", devices=("cpu", "gpu:N"))
    assert row.resolve_device("gpu:12") == "gpu:12" and row.resolve_device("auto") == "cpu"
    with pytest.raises(
        InputError, match=r"the runtime some works on auto, cpu, gpu:1, not on gpu$"
    ):
        row.resolve_device("gpu")


def test_a_gpu_takes_the_form_and_the_precision_that_are_fast_there() -> None:
    ort = RUNTIMES["onnxruntime"]
    assert ort.opens_on("cpu") == ("onnx", "onnx-gpu")
    assert ort.opens_on("cuda") == ort.opens_on("tensorrt:1") == ("onnx-gpu", "onnx")
    assert (FORMATS["onnx"].precision, FORMATS["tensorrt"].precision) == ("fp32", "fp16")
    assert preferred_precisions("cpu") == ("fp32", "fp16", "bf16", "int8", "fp8")
    assert preferred_precisions("gpu") == ("fp16", "fp32", "bf16", "int8", "fp8")


def test_fp8_is_for_gpus() -> None:
    able = [name for name, row in FORMATS.items() if "fp8" in row.precisions]
    assert able == ["onnx-gpu", "tensorrt", "tensorrt-rtx"]
    assert export_option("onnxruntime") == "--onnx"
    assert export_option("onnxruntime", "fp8") == "--onnx-gpu"
    with pytest.raises(InputError, match="openvino runs on CPUs, and fp8 is for GPUs"):
        export_option("openvino", "fp8")


class TestPlugIn:
    """The code of the how-to page, installed as a package of its own."""

    @pytest.fixture
    def installed(self, tmp_path: Path) -> dict[str, str]:
        return install_page("how-to/add-a-runtime.md", tmp_path)

    def test_its_artefacts_are_made_verified_and_opened(
        self, installed: dict[str, str], tmp_path: Path
    ) -> None:
        out = tmp_path / "artifacts"
        made = run_command(
            installed,
            "export",
            "--out",
            str(out),
            "--toy",
            "--graphs",
            GRAPH,
            "--parity-images",
            "1",
        )
        assert made.returncode == 0, made.stdout + made.stderr
        graphs = json.loads((out / "manifest.json").read_text())["graphs"]
        entry = next(entry for entry in graphs if entry["format"] == "toy")
        assert entry["passed"] is True and entry["max_abs_diff"] < 1e-3
        assert entry["file"] == f"toy/fp32/{GRAPH}.toy" and "onnx" in entry["versions"]
        code = (
            "import sys; from regionspot.runtime.artifacts import Manifest; "
            "from regionspot.runtime.opening import open_runner; "
            "manifest = Manifest.load(sys.argv[1]); runner = open_runner(manifest, "
            f"manifest.find('{GRAPH}', 'toy', 'fp32')); print(type(runner).__name__)"
        )
        opened = subprocess.run(
            [sys.executable, "-c", code, str(out)], env=installed, capture_output=True, text=True
        )
        assert opened.stdout.strip() == "ToyRunner", opened.stderr

    def test_its_options_are_those_of_the_commands(self, installed: dict[str, str]) -> None:
        assert "files for the toy runtime" in run_command(installed, "export", "--help").stdout
        assert "tensorrt-rtx,toy,triton" in run_command(installed, "predict", "--help").stdout

    def test_one_that_cannot_be_loaded_is_a_warning(self, tmp_path: Path) -> None:
        environment = install_entry_points(
            "[regionspot.formats]\ntoy = toy_that_is_not_there:ROWS\n", tmp_path
        )
        ran = run_command(environment, "export", "--help")
        assert ran.returncode == 0
        assert (
            "the plug-in toy (toy_that_is_not_there:ROWS) cannot be used: No module named"
            in ran.stderr
        )
