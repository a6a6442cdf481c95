"""One runtime and precision, timed in a process of its own.

`python -m regionspot.benchmarks.latency_worker REQUEST.json` prints a line of JSON for each
measurement. PyTorch is loaded only where it is what runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.benchmarks.memory import MIB, PeakMemory
from regionspot.benchmarks.synthetic import random_boxes, random_words
from regionspot.benchmarks.targets import Target, open_target
from regionspot.benchmarks.timing import cuda_clock, percentiles, repeat, wall_clock
from regionspot.errors import RegionSpotError
from regionspot.images import read_image
from regionspot.predictor import RegionPredictor, as_pipeline
from regionspot.runtime.graph_spec import ModelInfo, TensorSpec
from regionspot.runtime.native_runner import NativeRunner
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.runtime.runner import Array, Runner
from regionspot.structures import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Vocabulary

WHOLE, WHOLE_WITH_MASKS = "whole path", "whole path with masks"
DECODERS = {WHOLE: "sam_token_decoder_prompts", WHOLE_WITH_MASKS: "sam_mask_decoder"}
"""Which graph each sends its prompts through."""

CONTEXT = ("image_embeddings", "image_projections", "image_statistics")
TEXT_LENGTH = 16
WARM_UP, GPU_WARM_UP = 1, 3
"""Runs that are not timed."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        runtime, precision: of a `regionspot.benchmarks.targets.Target`.
        model: arguments of `create_model`, for torch.
        artifacts: directory of artefacts, for the others.
        graphs: names of graphs, WHOLE and WHOLE_WITH_MASKS.
        picture: file of the picture that the whole path starts from.
        seconds, at_least, at_most: how long and how often each measurement is repeated.
    """

    runtime: str
    precision: str
    graphs: list[str]
    batches: list[int]
    regions: list[int]
    words: int
    picture: str
    seconds: float
    at_least: int
    at_most: int
    device: str = "auto"
    threads: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    artifacts: str = ""


def main(argv: list[str] | None = None) -> int:
    """0, or 2 with one line on stderr for what is not usable."""
    (path,) = sys.argv[1:] if argv is None else argv
    request = Request(**json.loads(Path(path).read_text()))
    try:
        target = Target(request.runtime, request.precision)
        with open_target(
            target, request.model, request.artifacts, request.device, request.threads
        ) as opened:
            for row in measure(as_pipeline(opened), request):
                print(json.dumps(row), flush=True)
    except RegionSpotError as error:
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


def measure(pipeline: RegionPipeline, request: Request) -> Iterator[dict[str, Any]]:
    """A row for each graph and size; a graph that cannot be run is a row with a note."""
    for graph in request.graphs:
        for sizes in sizes_of(graph, request):
            row = {
                "graph": graph,
                "runtime": request.runtime,
                "precision": request.precision,
                **sizes,
            }
            try:
                yield row | _timed(pipeline, request, graph, sizes)
            except (RegionSpotError, RuntimeError) as error:  # the latter is PyTorch's
                yield row | {"note": (str(error).splitlines() or [repr(error)])[0]}


def sizes_of(graph: str, request: Request) -> list[dict[str, int | None]]:
    """Images at a time and regions of each; None where a graph does not depend on it."""
    if graph in (WHOLE, WHOLE_WITH_MASKS):
        return [{"batch": 1, "regions": count} for count in request.regions]
    if graph == "clip_text_encoder":
        return [{"batch": None, "regions": None}]
    if graph in ("sam_image_encoder", "clip_image_encoder", "sam_token_decoder_image"):
        return [{"batch": batch, "regions": None} for batch in request.batches]
    return [
        {"batch": batch, "regions": count} for batch in request.batches for count in request.regions
    ]


def _timed(
    pipeline: RegionPipeline, request: Request, graph: str, sizes: Mapping[str, int | None]
) -> dict[str, Any]:
    memory, device = PeakMemory(), _DeviceMemory(request.device)
    run = _prepare(pipeline, request, graph, sizes)
    # the first of a size makes buffers, and kernels where they are compiled; TensorRT's second
    # captures a CUDA graph
    for _ in range(WARM_UP if device.cuda is None else GPU_WARM_UP):
        run()
    memory.start()
    clock = cuda_clock if device.cuda is not None else wall_clock
    seconds = repeat(run, request.at_least, request.seconds, request.at_most, clock)
    images = sizes["batch"] or 1
    per_second = images / float(np.median(seconds))
    return {
        "native": isinstance(pipeline.runner(DECODERS.get(graph, graph)), NativeRunner),
        "prompt_chunk": pipeline.prompt_chunk,
        **percentiles(seconds),
        "per_second": per_second,
        "peak_mb": memory.peak_mb(),
        "total_mb": memory.total_mb(),
        "device_mb": device.used_mb(),
    }


class _DeviceMemory:
    """What is taken of a GPU since this was made, by this and any other process; None where none is
    used.
    """

    def __init__(self, device: str) -> None:
        torch = sys.modules.get("torch")
        on_gpu = torch is not None and device != "cpu" and torch.cuda.is_available()
        self.cuda = torch.cuda if torch is not None and on_gpu else None
        self._free = self.cuda.mem_get_info()[0] if self.cuda is not None else 0

    def used_mb(self) -> float | None:
        return None if self.cuda is None else max(self._free - self.cuda.mem_get_info()[0], 0) / MIB


def _prepare(
    pipeline: RegionPipeline, request: Request, graph: str, sizes: Mapping[str, int | None]
) -> Run:
    batch, regions = sizes["batch"] or 1, sizes["regions"] or 1
    rng = np.random.default_rng(0)
    if graph in (WHOLE, WHOLE_WITH_MASKS):
        return _whole(pipeline, request, regions, graph == WHOLE_WITH_MASKS)
    runner = pipeline.runner(graph)
    if "prompts" in runner.spec.ranges:
        return _in_chunks(pipeline, runner, batch, regions, rng)
    axes = {"batch": batch, "regions": regions, "words": request.words, "texts": request.words}
    axes["text_length"] = min(TEXT_LENGTH, pipeline.info.context_length)
    feeds = {tensor.name: draw(tensor, axes, pipeline.info, rng) for tensor in runner.spec.inputs}
    return lambda: runner.infer(feeds)


def _whole(pipeline: RegionPipeline, request: Request, regions: int, masks: bool) -> Run:
    """From a file's bytes to names and scores."""
    predictor, picture = RegionPredictor(pipeline), Path(request.picture).read_bytes()
    rng = np.random.default_rng(0)
    embeddings = random_words(request.words, pipeline.info.embed_dim, rng)
    words = Vocabulary(tuple(f"word {index}" for index in range(len(embeddings))), embeddings)
    height, width, _ = read_image(picture).shape
    boxes = random_boxes(regions, height, width, rng)

    def run() -> None:
        predictor.set_image(picture).predict(boxes=boxes, vocabulary=words, return_masks=masks)

    return run


def _in_chunks(
    pipeline: RegionPipeline, runner: Runner, batch: int, regions: int, rng: np.random.Generator
) -> Run:
    """A decoder graph over all prompts, so many at a time as the pipeline sends."""
    image_part = pipeline.runner("sam_token_decoder_image")
    (embeddings,) = image_part.spec.inputs
    images = {embeddings.name: draw(embeddings, {"batch": batch}, pipeline.info, rng)}
    context = {**images, **image_part.infer(images, keep=image_part.spec.output_names)}
    shared = {name: context[name] for name in CONTEXT if name in runner.spec.input_names}
    prompts = runner.spec.ranges["prompts"]
    step = min(prompts.max, max(prompts.min, pipeline.prompt_chunk // batch))
    chunks = []
    for start in range(0, regions, step):
        axes = {"batch": batch, "prompts": min(step, regions - start), "points": 2, "tokens": 1}
        own = [tensor for tensor in runner.spec.inputs if tensor.name not in shared]
        chunks.append(
            shared | {tensor.name: draw(tensor, axes, pipeline.info, rng) for tensor in own}
        )
    return lambda: [runner.infer(feeds) for feeds in chunks]


def draw(
    tensor: TensorSpec, axes: Mapping[str, int], info: ModelInfo, rng: np.random.Generator
) -> Array:
    """A random input of a graph, in the range of real ones."""
    shape = tensor.resolved(axes)
    drawn: Array
    if tensor.name == "input_sizes":
        drawn = np.full(shape, info.sam_image_size)
    elif tensor.name == "labels":
        drawn = np.broadcast_to([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], shape)
    elif tensor.name == "token_ids":
        drawn = np.arange(shape[0])
    elif tensor.name == "points":
        drawn = np.sort(rng.uniform(0, info.sam_image_size, shape), axis=-2)
    elif tensor.dtype == "bool":
        drawn = np.ones(shape)
    elif tensor.dtype == "uint8":
        drawn = rng.integers(0, 256, shape)
    elif tensor.dtype == "int32":  # tokens of texts: any word of any vocabulary
        drawn = rng.integers(1, 256, shape)
    else:
        drawn = rng.normal(size=shape)
    return drawn.astype(tensor.dtype)


if __name__ == "__main__":
    sys.exit(main())
