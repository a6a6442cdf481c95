"""What every test gets: a cache folder of its own, and no `gpu` tests where there is no GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Text embeddings are cached for this run alone, not in the user's cache; child processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONSPOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def mini_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """regionspot_mini as ONNX in single precision, all that recognising boxes takes, verified. Copy it to change it."""
    from regionspot.cli.main import main
    from regionspot.export.build import PIPELINE_GRAPHS

    directory = tmp_path_factory.mktemp("artifacts")
    graphs = ",".join([*PIPELINE_GRAPHS, "clip_text_encoder"])
    assert main(["export", "--out", str(directory), "--graphs", graphs, "--parity-images", "2"]) == 0
    return directory


@pytest.fixture(scope="session")
def mini_artifacts_with_masks(mini_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the graph that draws masks, put beside the others by a second export."""
    from regionspot.cli.main import main

    directory = Path(shutil.copytree(mini_artifacts, tmp_path_factory.mktemp("artifacts") / "with_masks"))
    assert main(["export", "--out", str(directory), "--graphs", "sam_mask_decoder", "--parity-images", "2"]) == 0
    return directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not shutil.which("chromium"):
        _skip(items, "browser", "needs Chromium: apt-get install chromium")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
