"""Run artefacts in a child process, so that a runtime that crashes or hangs is a failure with a
reason and no more.

`run_in_child` is the parent's side. The child, `python -m regionspot.runtime.run_graph
REQUEST.json`, reads the request and its inputs, and writes what comes out beside them. It loads
PyTorch for TensorRT's engines alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regionspot.child_process import run_module
from regionspot.errors import ArtifactError, RegionSpotError
from regionspot.runtime.artifacts import spec_from_json, spec_to_json
from regionspot.runtime.formats import open_graph
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.opening import open_pipeline
from regionspot.runtime.runner import Array, in_half_where_wanted

if TYPE_CHECKING:
    from regionspot.runtime.pipeline import RegionPipeline

TIMEOUT_S = 1800.0
Samples = Sequence[Mapping[str, Array]]

_REQUEST, _INPUTS, _OUTPUTS = "request.json", "inputs.npz", "outputs.npz"


def graph_request(
    path: Path,
    spec: GraphSpec,
    runtime: str,
    precision: str,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """To run one graph: arguments of `open_graph`."""
    return {
        "graph": {
            "path": str(path),
            "spec": spec_to_json(spec),
            "runtime": runtime,
            "precision": precision,
        },
        "device": device,
        "threads": threads,
    }


def pipeline_request(
    directory: Path,
    runtime: str,
    precision: str,
    device: str = "auto",
    threads: int | None = None,
    native: bool = True,
    artefact_format: str | None = None,
) -> dict[str, Any]:
    """To run the whole pipeline on samples as `recognize` takes them, whether its graphs passed or
    not.
    """
    return {
        "pipeline": {
            "artifacts": str(directory),
            "runtime": runtime,
            "precision": precision,
            "native": native,
            "artefact_format": artefact_format,
        },
        "device": device,
        "threads": threads,
    }


def run_in_child(
    request: Mapping[str, Any], samples: Samples, timeout_s: float = TIMEOUT_S
) -> list[dict[str, Array]]:
    """The outputs for each of several samples of inputs; those in single precision are converted
    where the graph takes half precision.

    Raises:
        ArtifactError: the child crashed, hung or refused; the message says how.
    """
    with tempfile.TemporaryDirectory(prefix="regionspot-") as name:
        folder = Path(name)
        (folder / _REQUEST).write_text(json.dumps(dict(request)))
        _write_samples(folder / _INPUTS, samples)
        child = run_module("regionspot.runtime.run_graph", folder / _REQUEST, timeout_s=timeout_s)
        if child.failure:
            raise ArtifactError(f"running it {child.failure}")
        return _read_samples(folder / _OUTPUTS)


def recognize(pipeline: RegionPipeline, sample: Mapping[str, Array]) -> dict[str, Array]:
    """The whole way from pictures and prompts to logits.

    Args:
        sample: `images`, `input_sizes`, `clip_images`, `points`, `labels` and `valid` as the graphs
            take them, and either `text_embeddings` (V, E) or `tokens` (V, T) of the words.

    Returns:
        `logits` (B, N, V).
    """
    encoded = pipeline.encode_image(sample["images"], sample["input_sizes"])
    patch_tokens = pipeline.encode_clip(sample["clip_images"])
    mask_tokens, _ = pipeline.mask_tokens(
        encoded, sample["points"], sample["labels"], False
    )  # (B, N, 1, C)
    if "tokens" in sample:
        embeddings = pipeline.encode_tokens(sample["tokens"])  # (V, E)
        text_embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    else:
        text_embeddings = sample["text_embeddings"]
    return {
        "logits": pipeline.classify(
            mask_tokens[:, :, 0], patch_tokens, sample["valid"], text_embeddings
        )
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The child's side; 0, or 2 with one line on stderr for what is not usable."""
    (path,) = map(Path, sys.argv[1:] if argv is None else argv)
    try:
        outputs = _run(json.loads(path.read_text()), _read_samples(path.with_name(_INPUTS)))
    except RegionSpotError as error:
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    _write_samples(path.with_name(_OUTPUTS), outputs)
    return 0


def _run(request: Mapping[str, Any], samples: Samples) -> list[dict[str, Array]]:
    where = {"device": request["device"], "threads": request["threads"]}
    if "pipeline" in request:
        pipeline = open_pipeline(**request["pipeline"], **where, allow_failed=True)
        return [recognize(pipeline, sample) for sample in samples]
    graph = request["graph"]
    path, spec = Path(graph["path"]), spec_from_json(graph["spec"])
    with open_graph(path, spec, graph["runtime"], graph["precision"], **where) as runner:
        return [runner.infer(in_half_where_wanted(spec, sample)) for sample in samples]


def _write_samples(path: Path, samples: Samples) -> None:
    named: dict[str, Any] = {
        f"{index}/{name}": array
        for index, sample in enumerate(samples)
        for name, array in sample.items()
    }
    np.savez(path, **named)


def _read_samples(path: Path) -> list[dict[str, Array]]:
    samples: dict[int, dict[str, Array]] = {}
    with np.load(path, allow_pickle=False) as content:
        for key in content.files:
            index, _, name = key.partition("/")
            samples.setdefault(int(index), {})[name] = content[key]
    return [samples[index] for index in sorted(samples)]


if __name__ == "__main__":
    sys.exit(main())
