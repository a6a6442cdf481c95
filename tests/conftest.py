"""What every test gets: a cache folder of its own, and no `gpu` tests where there is no GPU."""

from __future__ import annotations

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
