"""What a release brings besides the package: workflows, issue forms, citation. Checked against
published schemas.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import regionspot

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {
    "CITATION.cff": "citation-file-format",
    **{
        f".github/workflows/{path.name}": "github-workflows"
        for path in (ROOT / ".github/workflows").iterdir()
    },
    **{f".github/ISSUE_TEMPLATE/{name}.yml": "github-issue-forms" for name in ("bug", "feature")},
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_files_are_as_their_schemas_want(name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        f"vendor.{SCHEMAS[name]}",
        str(ROOT / name),
    ]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == regionspot.__version__


def test_workflows_call_targets_and_files_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in (ROOT / ".github/workflows").iterdir():
        for command in re.findall(r"- run: (.+)", path.read_text()):
            if command.startswith("make "):
                assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
            elif command.startswith("."):
                assert (ROOT / command).is_file(), command


def test_wheels_are_built_for_every_python_that_is_supported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [re.search(r":: (3\.\d+)$", line) for line in project["project"]["classifiers"]]
    supported = [f"cp{found[1].replace('.', '')}-*" for found in named if found]
    assert project["tool"]["cibuildwheel"]["build"] == supported
