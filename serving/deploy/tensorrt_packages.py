"""Prints which TensorRT packages of pip have the version of an image's own libraries.

    python3 tensorrt_packages.py [ROOT]

Engines load only in the version of TensorRT that built them, so a builder of engines for a server
uses that server's libnvinfer, and bindings of exactly its version. NVIDIA's wheels with another
copy of the libraries are named only where the image lacks some that a builder needs.

Runs in the image's system Python, before anything is installed: standard library alone.
"""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("usr/lib/*-linux-gnu", "usr/lib64", "usr/local/tensorrt*/lib", "opt/tensorrt*/lib")
"""Where NVIDIA's packages and archives put TensorRT's libraries."""

CUDA = ("usr/local/cuda*/lib64", "usr/local/cuda*/targets/*/lib", *LIBRARIES)

NEEDED = ("libnvinfer_plugin", "libnvonnxparser", "libnvinfer_builder_resource*")
"""What the bindings load, and what a builder loads, besides libnvinfer."""

VERSION_SYMBOL = re.compile(rb"\0tensorrt_version_(\d+)_(\d+)_(\d+)_(\d+)\0")
"""A symbol that libnvinfer exports: `nm -D libnvinfer.so | grep tensorrt_version`."""

PACKAGE = re.compile(r"^Package: libnvinfer\d+$(?:\n(?!\n).*)*?\nVersion: (\d+(?:\.\d+){3})", re.M)


def tensorrt_version(root: Path) -> str:
    """Returns the four numbers of libnvinfer's version: the library's own word, else that of the
    package database.

    Raises:
        LookupError: there is no libnvinfer, or its version is nowhere to be found.
    """
    libraries = list(_find(root, LIBRARIES, "libnvinfer.so.*"))
    if not libraries:
        raise LookupError(f"there is no libnvinfer.so below {root}: is this an image of Triton?")
    for library in libraries:
        if (version := _exported_version(library)) is not None:
            return version
    status = root / "var/lib/dpkg/status"
    found = PACKAGE.search(status.read_text(encoding="utf-8")) if status.is_file() else None
    if found is None:
        raise LookupError(
            f"neither {libraries[0]} nor {status} says which version of TensorRT this is"
        )
    return found[1]


def cuda_major(root: Path) -> str:
    """Returns the first number of the CUDA runtime's version. Raises LookupError where there is
    none.
    """
    majors = [
        int(found[1])
        for library in _find(root, CUDA, "libcudart.so.*")
        if (found := re.fullmatch(r"libcudart\.so\.(\d+)[\d.]*", library.name))
    ]
    if not majors:
        raise LookupError(f"there is no libcudart.so below {root}: is this an image with CUDA?")
    return str(max(majors))


def requirements(root: Path) -> list[str]:
    """Returns lines for `pip install --no-deps`. Raises LookupError as the functions above do."""
    package, version = f"tensorrt_cu{cuda_major(root)}", tensorrt_version(root)
    names = [package, f"{package}_bindings"]
    if not all(any(_find(root, LIBRARIES, f"{name}.so.*")) for name in NEEDED):
        names.append(f"{package}_libs")
    return [f"{name}=={version}" for name in names]


def _find(root: Path, folders: tuple[str, ...], name: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(root.glob(f"{folder}/{name}"))


def _exported_version(library: Path) -> str | None:
    """Reads the version symbol out of a library of some hundred megabytes."""
    if library.stat().st_size == 0:
        return None
    with (
        open(library, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        found = VERSION_SYMBOL.search(content)
        return ".".join(part.decode() for part in found.groups()) if found else None


if __name__ == "__main__":
    try:
        print("\n".join(requirements(Path(sys.argv[1] if len(sys.argv) > 1 else "/"))))
    except LookupError as error:
        sys.exit(f"error: {error}")
