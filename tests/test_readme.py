"""The README's commands and code, run as a reader would: ```bash and ```python blocks, in order, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(*languages: str) -> list[tuple[str, str]]:
    found = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [(language, text) for language, text in found if language in languages]


def test_blocks_run_in_order(tmp_path: Path) -> None:
    scripts = sysconfig.get_path("scripts")
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
    environment["REGIONSPOT_SERVER_HOME"] = str(ROOT / "build" / "server")  # installed once, see tests/serving
    executed = blocks("bash", "python")
    assert len(executed) >= 4

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    try:
        for language, text in executed:
            done = run(["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text])
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    finally:
        run([f"{scripts}/regionspot-serve", "down", "--grpc-port", "18101"])
    assert Image.open(tmp_path / "overlay.png").width >= 768
    answer = json.loads((tmp_path / "out.json").read_text())
    assert len(answer["regions"]) == 2 and answer["regions"][0]["mask"]["counts"]
    assert len(json.loads((tmp_path / "served.json").read_text())["regions"]) == 2
    assert (tmp_path / "runs/first/head.safetensors").is_file()
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == {"head", "clip_crops", "roi_pooling"}


@pytest.mark.parametrize(
    "command",
    [
        "regionspot",
        "regionspot-train",
        "regionspot-eval",
        "regionspot-export",
        "regionspot-query",
        "regionspot-serve",
        "regionspot-benchmark",
    ],
)
def test_commands_that_need_the_users_files_name_options_that_exist(command: str) -> None:
    from regionspot.cli import benchmark, evaluate, export, parity, predict, query, serve, train

    modules = {"regionspot-train": train, "regionspot-eval": evaluate, "regionspot-export": export}
    modules |= {"regionspot predict": predict, "regionspot parity": parity, "regionspot-query": query}
    parsers = {name: module.build_parser() for name, module in modules.items()}
    for command_name, module in (("regionspot-serve", serve), ("regionspot-benchmark", benchmark)):
        actions = module.build_parser()._subparsers
        assert actions is not None
        parsers |= {f"{command_name} {name}": one for name, one in actions._group_actions[0].choices.items()}
    for _, text in blocks("sh", "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for prefix, parser in parsers.items():
                if line.startswith(f"{prefix} ") and line.startswith(command):
                    known = parser._option_string_actions
                    assert set(re.findall(r"(?<= )--[\w-]+", line)) <= set(known), line


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []
