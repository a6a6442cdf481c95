"""Which TensorRT a builder image gets: that of the image's own libraries."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from regionspot.serving.deploy import tensorrt_packages
from regionspot.serving.deploy.tensorrt_packages import cuda_major, requirements, tensorrt_version

LIBRARIES = "usr/lib/x86_64-linux-gnu"
STATUS = """\
Package: libnvinfer-bin
Status: install ok installed
Version: 9.9.9.9-1+cuda12.9

Package: libnvinfer11
Status: install ok installed
Architecture: amd64
Version: 11.4.0.106-1+cuda13.3
Description: TensorRT runtime libraries

Package: libz
Version: 1.2.3.4
"""


def library(root: Path, name: str, content: bytes = b"\x7fELF\0", folder: str = LIBRARIES) -> None:
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def symbol(version: str) -> bytes:
    name = f"tensorrt_version_{version.replace('.', '_')}"
    return b"\x7fELF\0getInferLibVersion\0" + name.encode() + b"\0more\0"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A root as the packages of TensorRT and CUDA leave it."""
    for name in ("libnvinfer_plugin", "libnvonnxparser", "libnvinfer_builder_resource_sm89"):
        library(tmp_path, f"{name}.so.11.4.0")
    library(tmp_path, "libnvinfer.so.11.4.0", symbol("11.4.0.106"))
    (tmp_path / LIBRARIES / "libnvinfer.so.11").symlink_to("libnvinfer.so.11.4.0")
    for name in ("libcudart.so.13", "libcudart.so.13.4.28"):
        library(tmp_path, name, folder="usr/local/cuda-13.4/targets/x86_64-linux/lib")
    return tmp_path


def test_bindings_alone_where_the_libraries_are_there(image: Path) -> None:
    assert requirements(image) == [
        "tensorrt_cu13==11.4.0.106",
        "tensorrt_cu13_bindings==11.4.0.106",
    ]


@pytest.mark.parametrize("missing", ["libnvonnxparser", "libnvinfer_builder_resource_sm89"])
def test_the_libraries_too_where_one_is_missing(image: Path, missing: str) -> None:
    (image / LIBRARIES / f"{missing}.so.11.4.0").unlink()
    assert requirements(image)[2:] == ["tensorrt_cu13_libs==11.4.0.106"]


def test_another_release(tmp_path: Path) -> None:
    library(tmp_path, "libnvinfer.so.10.9.0", symbol("10.9.0.34"), "usr/local/tensorrt/lib")
    library(tmp_path, "libcudart.so.12.8.57", folder="usr/local/cuda/lib64")
    assert (tensorrt_version(tmp_path), cuda_major(tmp_path)) == ("10.9.0.34", "12")


def test_the_package_database_where_the_library_does_not_say(image: Path) -> None:
    library(image, "libnvinfer.so.11.4.0", b"")
    with pytest.raises(LookupError, match=r"neither .*libnvinfer\.so\.11.* nor .*dpkg/status says"):
        tensorrt_version(image)
    database = image / "var/lib/dpkg/status"
    database.parent.mkdir(parents=True)
    database.write_text(STATUS)
    assert tensorrt_version(image) == "11.4.0.106"


def test_the_librarys_own_word_counts(image: Path) -> None:
    database = image / "var/lib/dpkg/status"
    database.parent.mkdir(parents=True)
    database.write_text(STATUS.replace("11.4.0.106", "11.3.0.99"))
    assert tensorrt_version(image) == "11.4.0.106"


def test_another_image(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"no libnvinfer\.so below"):
        tensorrt_version(tmp_path)
    with pytest.raises(LookupError, match=r"no libcudart\.so below"):
        cuda_major(tmp_path)


def test_as_the_dockerfile_runs_it(image: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def run(root: Path) -> subprocess.CompletedProcess[str]:
        assert tensorrt_packages.__file__ is not None
        command = [sys.executable, "-I", tensorrt_packages.__file__, str(root)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run(image).stdout.split() == requirements(image)
    other = run(tmp_path_factory.mktemp("empty"))
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr.startswith("error: there is no libcudart.so below")


def test_a_real_library_exports_its_version() -> None:
    """TensorRT-RTX's, which runs here and has the symbol under the same name."""
    libraries = pytest.importorskip("tensorrt_rtx_libs")
    (path,) = Path(libraries.__file__).parent.glob("libtensorrt_rtx.so*")
    version = import_module("tensorrt_rtx_bindings").__version__
    assert tensorrt_packages._exported_version(path) == version
