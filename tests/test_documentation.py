"""README and the documentation site: every ```bash and ```python block runs, options exist, links
lead somewhere.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """README, then the pages of the site in the order of its navigation."""

    def named(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, list):
            yield from (name for part in entry for name in named(part))
        else:
            yield from (name for part in entry.values() for name in named(part))

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    return [ROOT / "README.md", *(ROOT / "docs" / name for name in named(navigation))]


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Language and text of each block, page after page."""
    found = [block for page in pages() for block in BLOCK.findall(page.read_text(encoding="utf-8"))]
    return [(language, text) for language, text in found if language in languages]


def commands(script: str) -> list[str]:
    """The commands of a block, each on its own lines."""
    return re.findall(r"(?:.*\\\n)*.+", script)


@pytest.fixture
def environment() -> dict[str, str]:
    scripts = sysconfig.get_path("scripts")
    found = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "2",
    }
    # installed once, see tests/serving
    return found | {"REGIONSPOT_SERVER_HOME": str(ROOT / "build" / "server")}


def test_blocks_run_in_order_in_an_empty_folder(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """A command or a piece of Python that an earlier page had runs once; blocks that start a job
    in the background run whole.
    """
    executed: set[str] = set()

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )

    try:
        for language, text in blocks("bash", "python"):
            parts = commands(text) if language == "bash" else [text]
            whole = any(part.endswith("&") for part in parts)
            new = [part for part in parts if whole or part not in executed]
            executed.update(new)
            script = "\n".join(new)
            if whole:  # a job that outlives the block would keep its output open
                script = f"trap 'jobs -p | xargs -r kill' EXIT\n{script}"
            shell = (
                ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
            )
            done = run([*shell, script])
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    finally:
        run(["regionspot-serve", "down", "--grpc-port", "18101"])
    assert max(Image.open(tmp_path / "overlay.png").size) >= 768
    answer = json.loads((tmp_path / "out.json").read_text())
    assert len(answer["regions"]) == 2 and answer["regions"][0]["mask"]["counts"]
    assert len(json.loads((tmp_path / "served.json").read_text())["regions"]) == 2
    assert len(json.loads((tmp_path / "answer.json").read_text())["regions"]) == 1
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["cached"] is True and again["regions"][0]["mask"]["counts"]
    assert json.loads((tmp_path / "openapi.json").read_text())["openapi"] == "3.1.0"
    assert (tmp_path / "runs/first/head.safetensors").is_file()
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == {
        "head",
        "clip_crops",
        "roi_pooling",
    }


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
    modules |= {
        "regionspot predict": predict,
        "regionspot parity": parity,
        "regionspot-query": query,
    }
    parsers = {name: module.build_parser() for name, module in modules.items()}
    for command_name, module in (("regionspot-serve", serve), ("regionspot-benchmark", benchmark)):
        actions = module.build_parser()._subparsers
        assert actions is not None
        parsers |= {
            f"{command_name} {name}": one for name, one in actions._group_actions[0].choices.items()
        }
    for _, text in blocks("sh", "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for prefix, parser in parsers.items():
                if line.startswith(f"{prefix} ") and line.startswith(command):
                    known = parser._option_string_actions
                    assert set(re.findall(r"(?<= )--[\w-]+", line)) <= set(known), line


def test_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(
        r"\]\(([^)#]+)(?:#[\w-]+)?\)", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    local = [target for target in targets if not target.startswith("http")]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_results_that_the_pages_quote_exist() -> None:
    quoted = {
        name
        for page in pages()
        for name in re.findall(r"benchmarks/results/[\w.]+", page.read_text())
    }
    assert quoted
    assert [name for name in sorted(quoted) if not (ROOT / name).is_file()] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "site/reference/predict/index.html").read_text(encoding="utf-8")
    assert "RegionPredictor" in reference and "original-image pixels" in reference
