"""What an import of a library that is not installed says, and whether pyproject.toml agrees."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from regionspot.extras import EXTRAS, WITH_TORCH, install_hint

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"open_clip": "open_clip_torch", "opentelemetry": "opentelemetry_api"}


def distributions(extra: str) -> set[str]:
    """Names of what an extra installs by itself, spelled as modules are."""
    lines = PROJECT["optional-dependencies"][extra]
    return {re.split(r"[<>=\[; ]", line)[0].replace("-", "_") for line in lines}


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_an_extra_installs_the_module_that_it_is_named_for(module: str, extra: str) -> None:
    assert DISTRIBUTIONS.get(module, module) in distributions(extra)


def test_only_libraries_of_extras_get_a_hint() -> None:
    assert install_hint(ModuleNotFoundError(name="torch.nn")) == (
        "this needs torch, which is not installed: pip install 'regionspot[torch]'"
    )
    assert install_hint(ModuleNotFoundError(name="regionspot.nothing")) is None
    assert str(install_hint(ModuleNotFoundError(name="torch"), "export")).endswith(
        "'regionspot[export]'"
    )
    assert str(install_hint(ModuleNotFoundError(name="openvino"), "export")).endswith(
        "'regionspot[openvino]'"
    )
    # installed, but broken: its own words say why
    assert install_hint(ImportError(name="torch")) is None


@pytest.mark.parametrize("extra", WITH_TORCH)
def test_extras_of_commands_include_torch(extra: str) -> None:
    assert any(
        re.match(r"regionspot\[torch\b", line) for line in PROJECT["optional-dependencies"][extra]
    )


def test_without_pytorch_its_users_are_told_what_to_install() -> None:
    block = "import sys; sys.modules['torch'] = None\n"
    cases = [
        "import regionspot; regionspot.create_model",
        "from regionspot.cli.main import main; sys.exit(main(['mini', 'pretrain', 'sam', '--out', "
        "'nowhere']))",
    ]
    for case in cases:
        run = subprocess.run([sys.executable, "-c", block + case], capture_output=True, text=True)
        assert (
            run.returncode != 0 and "pip install 'regionspot[torch]'" in run.stderr.splitlines()[-1]
        )


def test_the_base_installs_none_of_them() -> None:
    base = {re.split(r"[<>=\[; ]", line)[0].replace("-", "_") for line in PROJECT["dependencies"]}
    assert not base & {DISTRIBUTIONS.get(module, module) for module in EXTRAS}


def closure(extra: str) -> set[str]:
    """Names of what an extra installs, also through others of our extras."""
    found = distributions(extra) - {"regionspot"}
    for line in PROJECT["optional-dependencies"][extra]:
        if nested := re.match(r"regionspot\[([\w,-]+)\]", line):
            found = found.union(*(closure(name) for name in nested[1].split(",")))
    return found


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_no_extra_installs_both_wheels_of_onnxruntime(extra: str) -> None:
    assert len(closure(extra) & {"onnxruntime", "onnxruntime_gpu"}) < 2


def test_extras_for_gpus_mirror_those_for_cpus() -> None:
    assert closure("export-gpu") - {"onnxruntime_gpu"} == closure("export") - {"onnxruntime"}
    assert {"onnxruntime_gpu", "tensorrt"} == closure("onnx-tensorrt")


@pytest.mark.parametrize(
    ("extra", "version", "allowed"),
    [
        ("onnx-tensorrt", "10.16.1.11", True),
        ("onnx-tensorrt", "11.0.0.114", False),  # libnvinfer.so.11, which the provider cannot use
        ("tensorrt", "10.9.0.34", True),
        ("tensorrt", "11.4.0.106", True),
        ("tensorrt", "12.0.0", False),  # which nobody has tried
    ],
)
def test_versions_of_tensorrt(extra: str, version: str, allowed: bool) -> None:
    requirements = map(Requirement, PROJECT["optional-dependencies"][extra])
    (wanted,) = (one for one in requirements if one.name == "tensorrt")
    assert (version in wanted.specifier) is allowed
