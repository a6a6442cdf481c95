"""Installs the code of a how-to page as a package of its own, and runs commands beside it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def install_page(page: str, folder: Path) -> dict[str, str]:
    """Writes the titled code blocks of a page of `docs/` into a folder; the environment that finds
    them there.
    """
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = dict(
        re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    )
    for name, content in blocks.items():
        (folder / name).write_text(content)
    ((group, points),) = tomllib.loads(blocks["pyproject.toml"])["project"]["entry-points"].items()
    entries = "".join(f"{name} = {value}\n" for name, value in points.items())
    return install_entry_points(f"[{group}]\n{entries}", folder)


def install_entry_points(entry_points: str, folder: Path) -> dict[str, str]:
    """A distribution with these entry points and nothing else; the environment that finds it."""
    info = folder / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return os.environ | {"PYTHONPATH": str(folder)}


def run_command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`regionspot` with arguments, in an environment."""
    command = [sys.executable, "-m", "regionspot.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
