"""Options of ONNX Runtime's GPU providers, parsed by the real GPU wheel on a machine without a GPU.

The wheel's TensorRT provider is loaded over stub libraries: empty functions by the names that it
asks for. It gets as far as its options, and then misses CUDA.

    python -m pytest -m gpu_wheel    # downloads about 250 MB into build/, once
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.runtime.stub_libraries import NVINFER, NVONNXPARSER, compile_library

pytestmark = pytest.mark.gpu_wheel

HOME = Path(__file__).resolve().parents[2] / "build" / "onnxruntime-gpu"
PROVIDER = "libonnxruntime_providers_tensorrt.so"
TENSORRT = {"libnvinfer.so.10": NVINFER, "libnvonnxparser.so.10": NVONNXPARSER}
ONE_DEVICE = {
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "int cudaGetDevice(int *n) { *n = 0; return 0; }",
}
OPEN = """
import sys
from pathlib import Path
import onnx
import onnxruntime
from regionspot.errors import InputError
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.ort_runner import OrtRunner
path, provider = Path(sys.argv[1]), sys.argv[2]
assert "TensorrtExecutionProvider" in onnxruntime.get_available_providers()
onnx.save(onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 20]>
small (float[batch,4] x) => (float[batch,4] y) { y = Add(x, x) }'''), path)
spec = GraphSpec("small", "", (TensorSpec("x", "float32", ("batch", 4)),),
    (TensorSpec("y", "float32", ("batch", 4)),), {"batch": Range(1, 2, 8)})
try:
    OrtRunner(path, spec, provider)
except InputError as error:
    print("InputError:", error)
"""
PROBE = """
import onnxruntime
from regionspot.cli.probes import _try_providers
print(_try_providers(onnxruntime, has_gpu=True).detail)
print(_try_providers(onnxruntime, has_gpu=False))
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The folder of the unpacked GPU wheel."""
    folder = HOME / "wheel"
    if not (folder / "onnxruntime").is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        subprocess.run([*command, "--dest", str(HOME), "onnxruntime-gpu"], check=True)
        (path,) = HOME.glob("onnxruntime_gpu-*.whl")
        with zipfile.ZipFile(path) as content:
            content.extractall(folder)
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def stubs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the libraries that the TensorRT provider links to, empty."""
    folder = tmp_path_factory.mktemp("stubs")

    provider = wheel / "onnxruntime" / "capi" / PROVIDER
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(provider)], capture_output=True, text=True, check=True
    )
    wanted: dict[str, list[str]] = {}
    for name, library in re.findall(r"(cu\w+)@(lib\S+)", listed.stdout):
        wanted.setdefault(library, []).append(name)
    for library, names in wanted.items():
        versions = folder / f"{library}.map"
        versions.write_text(f"{library} {{ global: {'; '.join(names)}; }};")
        source = "\n".join(ONE_DEVICE.get(name, f"int {name}() {{ return 0; }}") for name in names)
        compile_library(folder, library, source, f"-Wl,--version-script={versions}")
    for library, source in TENSORRT.items():
        compile_library(folder, library, source)
    return folder


def printed(wheel: Path, stubs: Path, cache: Path, script: str, *arguments: str) -> str:
    """What a script prints; the wheel takes the place of the installed onnxruntime."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(wheel),
        "LD_LIBRARY_PATH": str(stubs),
        "REGIONSPOT_CACHE": str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def opened(wheel: Path, stubs: Path, path: Path, provider: str) -> str:
    """What comes of opening a graph."""
    return printed(wheel, stubs, path.parent / "cache", OPEN, str(path), provider)


def test_the_tensorrt_provider_takes_its_options(wheel: Path, stubs: Path, tmp_path: Path) -> None:
    """What it misses then is CUDA. Of an option it would say what its value should be."""
    said = opened(wheel, stubs, tmp_path / "small.onnx", "tensorrt")
    assert "could not start TensorrtExecutionProvider here" in said
    assert "CUDA Provider not available" in said and "should be" not in said


def test_the_cuda_provider_says_what_is_missing(wheel: Path, stubs: Path, tmp_path: Path) -> None:
    said = opened(wheel, stubs, tmp_path / "small.onnx", "cuda")
    assert "could not start CUDAExecutionProvider here and fell back" in said
    assert "Falling back to" not in said  # ONNX Runtime's own second try, with its reason lost


def test_doctor_names_the_library_that_is_missing(wheel: Path, stubs: Path, tmp_path: Path) -> None:
    """`get_available_providers` lists CUDA and TensorRT all the same."""
    said = printed(wheel, stubs, tmp_path, PROBE)
    assert "runs on cpu; cuda does not run: failed to load libonnxruntime_providers_cuda.so" in said
    assert "libcublasLt.so." in said and "tensorrt does not run: " in said
    assert "runs on cpu; cuda and tensorrt not tried: there is no NVIDIA GPU" in said
