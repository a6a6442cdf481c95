"""Artefacts in child processes: what comes back, and what is said where none does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import regionspot
from regionspot.errors import ArtifactError
from regionspot.runtime.artifacts import GraphEntry, Manifest
from regionspot.runtime.opening import open_runner
from regionspot.runtime.run_graph import graph_request, run_in_child

FEEDS = {
    "image_embeddings": np.linspace(-1, 1, 2 * 128 * 256, dtype=np.float32).reshape(2, 128, 16, 16)
}


@pytest.fixture(scope="module")
def decoder(mini_artifacts: Path) -> tuple[Manifest, GraphEntry]:
    manifest = Manifest.load(mini_artifacts)
    return manifest, manifest.find("sam_token_decoder_image", "onnx", "fp32")


def request(manifest: Manifest, entry: GraphEntry) -> dict:
    return graph_request(manifest.verify(entry), entry.spec, "onnxruntime", "fp32", "cpu")


def test_a_child_gives_what_this_process_gives(decoder: tuple[Manifest, GraphEntry]) -> None:
    halves = [{name: array[i : i + 1] for name, array in FEEDS.items()} for i in range(2)]
    outputs = run_in_child(request(*decoder), [FEEDS, *halves])
    with open_runner(*decoder, device="cpu") as runner:
        for found, feeds in zip(outputs, [FEEDS, *halves], strict=True):
            expected = runner.infer(feeds)
            assert set(found) == set(expected)
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array)


def test_a_file_that_is_refused_is_a_reason_in_one_line(
    decoder: tuple[Manifest, GraphEntry], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a graph")
    with pytest.raises(
        ArtifactError, match="ended with status 2: ONNX Runtime cannot load"
    ) as caught:
        run_in_child(graph_request(bad, decoder[1].spec, "onnxruntime", "fp32", "cpu"), [FEEDS])
    assert "\n" not in str(caught.value)


def test_feeds_that_are_none(decoder: tuple[Manifest, GraphEntry]) -> None:
    with pytest.raises(ArtifactError, match="must be float32"):
        run_in_child(request(*decoder), [{"image_embeddings": np.zeros((1, 128, 16, 16))}])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("library", "timeout_s", "message"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", 60.0, r"crashed \(SIGSEGV\)"),
        ("import time\ntime.sleep(60)\n", 3.0, "did not end in 3 s"),
        ("raise MemoryError('no room')\n", 60.0, "ended with status 1: MemoryError: no room"),
    ],
)
def test_a_runtime_that_takes_its_process_down(
    decoder: tuple[Manifest, GraphEntry],
    library: str,
    timeout_s: float,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stand-in for the library is found first on the child's path."""
    (tmp_path / "onnxruntime.py").write_text(library)
    root = Path(str(regionspot.__file__)).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(root)]))
    with pytest.raises(ArtifactError, match=message):
        run_in_child(request(*decoder), [FEEDS], timeout_s)
