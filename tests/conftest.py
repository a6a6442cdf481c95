"""What every test gets: a cache folder of its own, a name that stays, and no `gpu` tests where
there is no GPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all processes of a run: what takes long to make is made once."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_run(run_directory: Path) -> Iterator[None]:
    """Text embeddings are cached for this run alone, not in the user's cache; child processes
    inherit it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONSPOT_CACHE", str(run_directory / "cache"))
        yield


@pytest.fixture(scope="session")
def mini_artifacts(run_directory: Path) -> Path:
    """regionspot_mini as ONNX in single precision, all that recognising boxes takes, verified. Copy
    it to change it.
    """
    from regionspot.runtime.graphs import required_graphs

    return _exported(run_directory / "mini_artifacts", [*required_graphs(), "clip_text_encoder"])


@pytest.fixture(scope="session")
def mini_artifacts_with_masks(mini_artifacts: Path, run_directory: Path) -> Path:
    """With the graphs that draw masks and take them as prompts, put beside the others by a second
    export.
    """
    return _exported(
        run_directory / "mini_artifacts_with_masks",
        ["sam_mask_decoder", "sam_mask_prompt"],
        mini_artifacts,
    )


def _exported(directory: Path, graphs: list[str], beside: Path | None = None) -> Path:
    """Made by whichever process comes first; the others wait."""
    from regionspot.cli.main import main
    from regionspot.locks import locked

    with locked(directory.with_suffix(".lock")):  # beside it: the export locks the directory itself
        if not directory.with_suffix(".made").exists():
            if beside is not None:
                shutil.copytree(beside, directory)
            options = [
                "--out",
                str(directory),
                "--graphs",
                ",".join(graphs),
                "--parity-images",
                "2",
            ]
            assert main(["export", *options]) == 0
            directory.with_suffix(".made").touch()
    return directory


TESTS = Path(__file__).parent
SERVING = TESTS / "serving"
FIRST = [
    TESTS / name
    for name in (
        "test_documentation.py",
        "cli/test_export.py",
        "export/test_build.py",
        "export/test_parity.py",
    )
]
"""Files that take longest: begun first, several processes end at about the same time."""


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """No bytes in a test's name: compressed ones hold the time, and xdist wants the same names of
    all its workers.
    """
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    assert all(path.is_file() for path in FIRST), FIRST
    items.sort(key=lambda item: (SERVING not in item.path.parents, item.path not in FIRST))
    if not shutil.which("chromium"):
        _skip(items, "browser", "needs Chromium: apt-get install chromium")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process; those of a server all in the same, so that one server does
    for all.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return "serving" if SERVING in (config.rootpath / path).parents else path

    return ByFile(config, log)


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
