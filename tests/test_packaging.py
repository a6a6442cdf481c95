"""The wheel: built from the checkout as it is, and what must be in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import regionspot
from regionspot.cli.doctor import OLDEST_PYTHON

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "regionspot" / "mini"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-build-isolation",
        "--no-deps",
        "--quiet",
    ]
    command += [
        "--no-cache-dir",
        "--wheel-dir",
        str(folder),
        "--config-settings",
        f"build-dir={folder / 'build'}",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_sdist_holds_every_file_once(tmp_path: Path) -> None:
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, check=True
    )
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        members = {
            Path(*Path(member.name).parts[1:]).as_posix() for member in archive if member.isfile()
        }
    expected = subprocess.run(
        ["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    # no links
    files = {
        line.split("\t")[1] for line in expected.splitlines() if not line.startswith("120000 ")
    }
    assert members - {"PKG-INFO"} == {
        name for name in files if not name.startswith((".ci/", ".github/"))
    }


def test_one_top_level_name(names: list[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"regionspot"}


def test_every_module_of_the_checkout(names: list[str]) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "regionspot").rglob("*.py")}
    for folder in ("export", "serving", "benchmarks"):
        expected |= {
            f"regionspot/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / folder).rglob("*.py")
        }
    assert expected == {name for name in names if name.endswith(".py")}


def test_native_extension_and_types(names: list[str]) -> None:
    assert (
        sum(
            name.startswith("regionspot/_native.") and name.endswith((".so", ".pyd"))
            for name in names
        )
        == 1
    )
    assert {"regionspot/_native.pyi", "regionspot/py.typed"} <= set(names)


def test_one_wheel_serves_all_pythons_that_have_a_stable_abi(wheel: Path) -> None:
    tag = "cp312-abi3" if sys.version_info >= (3, 12) else "cp311-cp311"
    assert wheel.name.startswith(f"regionspot-{regionspot.__version__}-{tag}-")


def test_package_data(names: list[str]) -> None:
    data = [
        *(ROOT / "regionspot" / "configs").glob("*.yaml"),
        *MINI.glob("*.md"),
        *(MINI / "weights").iterdir(),
    ]
    data += [
        path for path in (ROOT / "serving").rglob("*") if path.is_file() and path.suffix != ".pyc"
    ]
    assert {path.suffix for path in data} >= {
        ".yaml",
        ".md",
        ".safetensors",
        ".js",
        ".html",
        ".css",
        ".txt",
        ".tpl",
    }
    installed = {
        path.relative_to(ROOT).as_posix().replace("serving/", "regionspot/serving/", 1)
        for path in data
    }
    assert installed | {"regionspot/benchmarks/page.html.jinja"} <= set(names)


def test_nothing_else(names: list[str]) -> None:
    assert not [
        name
        for name in names
        if "__pycache__" in name or name.endswith((".cpp", ".hpp", ".a", ".o"))
    ]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, '.'); sys.meta_path[:] = [f for f in sys.meta_path if "
        "'ScikitBuild' not in type(f).__name__]; import regionspot.masks, regionspot.export, "
        "regionspot.serving, regionspot.benchmarks; print(regionspot.masks.__file__, "
        "regionspot.export.__file__, regionspot.masks._native.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(Path(path).is_relative_to(tmp_path) for path in run.stdout.split())
    shutil.rmtree(tmp_path / "regionspot")


def test_every_dependency_is_pinned() -> None:
    """`constraints.txt` names every direct dependency of `make setup` with one exact version."""
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines), (
        "an inexact pin"
    )
    pinned = {_normal(line.split("==")[0]) for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    (setup,) = re.findall(r'-e "\.\[([a-z,-]+)\]"', (ROOT / "Makefile").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in [*setup.split(","), "torch", "onnx"]:  # the last two come through others
        wanted += extras[extra]
    names = {_normal(re.split(r"[<>=\[; ]", line)[0]) for line in wanted}
    assert names - {"regionspot"} <= pinned


def _normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-").replace(".", "-")


@pytest.mark.parametrize(
    ("compiler", "version", "builds"),
    [
        ("GNU", "11.4.0", False),
        ("GNU", "12.2.0", True),
        ("Clang", "17.0.1", False),
        ("Clang", "18.1.0", True),
    ],
)
def test_an_old_compiler_is_refused(
    tmp_path: Path, compiler: str, version: str, builds: bool
) -> None:
    """It would build kernels for SSE2 alone, without a word."""
    pretended = {"ID_RUN": "1", "ID": compiler, "VERSION": version}
    pretended |= {"STANDARD_COMPUTED_DEFAULT": "17", "EXTENSIONS_COMPUTED_DEFAULT": "ON"}
    pretended = {
        f"CMAKE_CXX_{'' if 'COMPUTED' in name else 'COMPILER_'}{name}": pretended[name]
        for name in pretended
    }
    options = {"REGIONSPOT_EXTENSION": "OFF", "BUILD_TESTING": "OFF", "CMAKE_SYSTEM_NAME": "Linux"}
    options |= {"CMAKE_SYSTEM_PROCESSOR": "x86_64", **pretended}
    command = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        *(f"-D{name}={value}" for name, value in options.items()),
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    refused = "cannot make kernels for AVX2 and AVX-512" in run.stderr
    assert refused != builds and (run.returncode == 0) == builds, run.stderr
    if not builds:
        allowed = subprocess.run(
            [*command, "-DREGIONSPOT_BASELINE=ON"],
            capture_output=True,
            env=os.environ | {"PATH": path},
        )
        assert allowed.returncode == 0 and b"SSE2 alone" in allowed.stderr


def test_one_range_of_pythons() -> None:
    """What the package asks for, what `make setup` lets pass, what doctor says and what the linter
    assumes.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    makefile, cmake = ((ROOT / name).read_text() for name in ("Makefile", "CMakeLists.txt"))
    bounds = re.search(r"\((\d), (\d+)\) <= sys\.version_info\[:2\] <= \((\d), (\d+)\)", makefile)
    assert bounds is not None
    first, last = (int(bounds[1]), int(bounds[2])), (int(bounds[3]), int(bounds[4]))
    assert project["project"]["requires-python"] == f">={first[0]}.{first[1]}"
    assert project["tool"]["ruff"]["target-version"] == f"py{first[0]}{first[1]}"
    assert first == OLDEST_PYTHON and f"find_package(Python {first[0]}.{first[1]} " in cmake
    assert (
        f"for Python {first[0]}.{first[1]} to {last[0]}.{last[1]}."
        in (ROOT / "constraints.txt").read_text()
    )
    named = [line for line in project["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert named == [
        f"Programming Language :: Python :: 3.{minor}" for minor in range(first[1], last[1] + 1)
    ]
    assert first <= sys.version_info[:2] <= last


@pytest.mark.parametrize("version", [(3, 10), (3, 15)])
def test_make_setup_refuses_other_pythons_at_once(tmp_path: Path, version: tuple[int, int]) -> None:
    """With a Python that says it is another one, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c \"import sys; sys.version_info = {version}; $2\"\n"
    )
    python.chmod(0o755)
    run = subprocess.run(
        ["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode != 0 and not (tmp_path / ".venv").exists()
    assert (
        "is not Python 3.11 to 3.14, for which the packages pinned in constraints.txt have releases"
        in run.stderr
    )
