"""The ways to recognise regions that `regionspot-benchmark peers` compares, each run in a process
of its own.

`python -m regionspot.benchmarks.peer_variants NAME DIR`, where NAME is a way or "WAY+masks", reads
DIR/request.json, DIR/picture and DIR/inputs.npz, prints a line of JSON for each number of regions,
and writes what was found to DIR/NAME-REGIONS.npy (scores) and .json (masks). A way of exported
artefacts loads no PyTorch here.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regionspot.benchmarks.baseline import Baseline, Outcome
from regionspot.benchmarks.memory import PeakMemory
from regionspot.benchmarks.stages import Stages
from regionspot.benchmarks.timing import median, repeat, wall_clock
from regionspot.errors import RegionSpotError
from regionspot.predictor import RegionPredictor
from regionspot.structures import FloatArray, Vocabulary

if TYPE_CHECKING:
    from regionspot.modeling.regionspot import RegionSpot
    from regionspot.runtime.pipeline import RegionPipeline

RESEARCH, CLIP_CROPS = "research", "clip_crops"
DETECTORS = ("grounding_dino", "owlv2")
PEERS = (RESEARCH, CLIP_CROPS, *DETECTORS)
TORCH = "torch_fp32"
MASKS = "+masks"

SLOW_S = 20.0
"""What takes longer is measured once, unless the user asks for more."""

FIRST_COUNTS = (1, 2, 3)
"""Numbers of regions that arithmetic is counted with, see `extrapolate`."""


STAGES = {
    "preprocess": "decode_resize",
    "sam_image_encoder": "sam_encoder",
    "sam_token_decoder_image": "token_decoder",
    "sam_token_decoder_prompts": "token_decoder",
    "sam_mask_decoder": "masks",
    "encode_masks": "masks",
    "clip_image_encoder": "clip_encoder",
    "region_head": "head",
}
"""What `RegionPipeline.observer` is told, and what it is called in the report. With masks one graph
gives tokens and masks: its time is "masks".
"""


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        model: arguments of `create_model`.
        artifacts: directory of the exported graphs.
        repetitions: None stands for one of what is slow, and the usual number of anything else.
        seed: of the detectors' weights and words.
    """

    model: dict[str, Any]
    regions: list[int]
    artifacts: str | None
    threads: int
    repetitions: int | None
    seed: int


@dataclass(frozen=True, eq=False)
class Inputs:
    """What every way is given.

    Args:
        picture: an encoded file.
        boxes: (N, 4) xyxy in the picture's pixels, N the largest number of regions.
        words: (V, E) unit rows.
    """

    picture: bytes
    boxes: FloatArray
    words: FloatArray

    def save(self, folder: Path) -> None:
        (folder / "picture").write_bytes(self.picture)
        np.savez(folder / "inputs.npz", boxes=self.boxes, words=self.words)

    @classmethod
    def load(cls, folder: Path) -> Inputs:
        with np.load(folder / "inputs.npz") as arrays:
            return cls((folder / "picture").read_bytes(), arrays["boxes"], arrays["words"])


class Ours:
    """`RegionPredictor`, with its stages timed."""

    def __init__(self, model: RegionSpot | RegionPipeline, words: FloatArray, draw: bool) -> None:
        self.stages = Stages()
        self.words = Vocabulary(tuple(f"word {index}" for index in range(len(words))), words)
        self.predictor, self.draw = RegionPredictor(model), draw
        self.in_torch = self.predictor.pipeline.runtime == "torch"
        self._open_graphs()
        self.predictor.pipeline.observer = lambda stage: self.stages.of(STAGES[stage])

    def __call__(self, picture: bytes, boxes: FloatArray) -> Outcome:
        with self.stages.of("other"):
            self.predictor.set_image(picture)
            found = self.predictor.predict(
                vocabulary=self.words, boxes=boxes, top_k=len(self.words), return_masks=self.draw
            )
        scores = np.empty_like(found.top_scores)
        np.put_along_axis(scores, found.top_class_ids, found.top_scores, axis=1)
        return Outcome(scores, found.masks or ())

    def _open_graphs(self) -> None:
        """All that are needed, and no other: what they take is the loaded model's."""
        decoder = "sam_mask_decoder" if self.draw else "sam_token_decoder_prompts"
        for graph in (
            "sam_image_encoder",
            "sam_token_decoder_image",
            decoder,
            "clip_image_encoder",
            "region_head",
        ):
            self.predictor.pipeline.runner(graph)


def variant_name(way: str, draw: bool) -> str:
    return f"{way}{MASKS}" if draw else way


def start(way: str, draw: bool, request: Request, words: FloatArray) -> Baseline:
    """Raises what `create_model` and `open_pipeline` raise."""
    if way in (*PEERS, TORCH):
        return _start_in_torch(way, draw, request, words)
    from regionspot.runtime.opening import open_pipeline

    runtime, precision = way.rsplit("_", 1)
    where: dict[str, Any] = {"device": "cpu", "threads": request.threads}
    return Ours(open_pipeline(str(request.artifacts), runtime, precision, **where), words, draw)


def _start_in_torch(way: str, draw: bool, request: Request, words: FloatArray) -> Baseline:
    import torch

    torch.set_num_threads(request.threads)
    if way in DETECTORS:
        from regionspot.benchmarks.detectors import Detector, build

        detector: Baseline = Detector(build(way, request.seed), len(words), request.seed)
        return detector
    from regionspot.modeling.presets import create_model

    model = create_model(**request.model)
    if way == TORCH:
        return Ours(model, words, draw)
    from regionspot.benchmarks.research_pipeline import ClipCrops, Research

    peer: Baseline = (Research if way == RESEARCH else ClipCrops)(model, words, draw)
    return peer


def main(variant: str, folder: Path) -> None:
    with contextlib.suppress(OSError):  # if memory runs out, it is this process that is to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    way_name, draw = variant.removesuffix(MASKS), variant.endswith(MASKS)
    request = Request(**json.loads((folder / "request.json").read_text()))
    inputs = Inputs.load(folder)
    try:
        way = start(way_name, draw, request, inputs.words)
        load_peak_mb = PeakMemory().total_mb()
        memory = PeakMemory()
        way(inputs.picture, inputs.boxes[:1])  # warm-up
    except RegionSpotError as error:
        return _tell(note=str(error))
    counts: list[int | None] = [None] if way_name in DETECTORS else [*request.regions]
    for count in counts:
        try:
            found = measure(way, request, inputs, count, memory, folder / f"{variant}-{count}")
        except RegionSpotError as error:
            found = {"note": str(error)}
        _tell(regions=count, load_peak_mb=load_peak_mb, **found)
    if way.in_torch:
        _tell(gflop=gflop(way, inputs, counts))


def measure(
    way: Baseline,
    request: Request,
    inputs: Inputs,
    count: int | None,
    memory: PeakMemory,
    results: Path,
) -> dict[str, Any]:
    """Time and memory of `count` regions; what was found goes to files named `results`.

    The first run of a size also makes the runtimes' buffers: its memory counts, its time where it
    is the only one.
    """
    boxes, outcomes, stages = inputs.boxes[:count], list[Outcome](), list[dict[str, float]]()

    def run() -> None:
        way.stages.clear()
        outcomes[:] = [way(inputs.picture, boxes)]
        stages.append(way.stages.seconds)

    memory.start()
    first = wall_clock(run)
    peak_mb, total_mb = memory.peak_mb(), memory.total_mb()
    outcome = outcomes.pop()
    np.save(results.with_suffix(".npy"), outcome.scores)
    results.with_suffix(".json").write_text(json.dumps(outcome.masks))
    del outcome
    seconds = _repeat(run, first, request.repetitions)
    return {
        "seconds": median(seconds),
        "repetitions": len(seconds),
        "peak_mb": peak_mb,
        "total_mb": total_mb,
        "stages": {
            name: median([each[name] for each in stages[-len(seconds) :]]) for name in stages[0]
        },
    }


def _repeat(run: Callable[[], object], first: float, repetitions: int | None) -> list[float]:
    """Seconds of each repetition, of the first run alone where that is enough."""
    if repetitions == 1 or (repetitions is None and first > SLOW_S):
        return [first]
    if repetitions is None:
        return repeat(run)
    return repeat(run, at_least=repetitions, enough_s=0)


def gflop(way: Baseline, inputs: Inputs, counts: list[int | None]) -> dict[str, float]:
    """Number of regions -> billions of operations; of a detector's None, "None"."""
    from regionspot.benchmarks.flops import count_flops, extrapolate

    if counts == [None]:
        return {"None": count_flops(lambda: way(inputs.picture, inputs.boxes)) / 1e9}
    first = [
        count_flops(partial(way, inputs.picture, inputs.boxes[:count])) for count in FIRST_COUNTS
    ]
    return {str(count): extrapolate(first, count) / 1e9 for count in counts if count}


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
