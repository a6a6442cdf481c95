"""The public model of Triton's Python backend: `Recognizer` behind requests, with metrics."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from regionspot.predictor import RegionPredictor
from regionspot.runtime.artifacts import GraphEntry, Manifest
from regionspot.runtime.opening import open_pipeline
from regionspot.runtime.pipeline import SIZES_ON_CPU, SIZES_ON_GPU, RegionPipeline
from regionspot.serving.backends.bls import BlsRunner
from regionspot.serving.backends.recognizer import Counts, Recognizer, SharedState, read_vocabulary
from regionspot.serving.backends.requests import answer_of, arrays_of, log, refusal_of
from regionspot.serving.contract import INPUTS, MAX_BATCH, Limits
from regionspot.serving.messages import Question
from regionspot.vocabulary import EmbeddingMemory, VocabularyEncoder

COUNTERS = {
    "image_cache_hits": "questions about pictures that were encoded before",
    "image_cache_misses": "questions about pictures that were not",
    "image_cache_evictions": "pictures that were forgotten to make room",
    "words_encoded": "words that went through the text encoder",
    "regions": "regions that were named",
    "refusals": "pictures that were answered with an error",
    "decode_seconds": "seconds in decoding pictures",
    "encoders_seconds": "seconds in both image encoders, with resizing",
    "vocabulary_seconds": "seconds in looking words up and encoding them",
    "regions_seconds": "seconds in the token decoder, the head and the masks",
}
GAUGES = {
    "image_cache_bytes": "held for encoded pictures",
    "image_cache_pictures": "pictures that are held",
}


class TritonPythonModel:
    """On a CPU it runs the graphs itself, one picture after another, each on all cores. Elsewhere
    the graphs are models of the same server, and up to MAX_BATCH requests are worked on at once,
    whose pictures Triton batches.
    """

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        values = {
            name: json.loads(value["string_value"]) for name, value in config["parameters"].items()
        }
        self._repository = Path(args["model_repository"]).parent
        self._values, self._outside = values, values["run_graphs"] == "triton"
        folder = Path(args["model_repository"]) / args["model_version"]
        self._shared = self._make_shared(folder)
        workers = MAX_BATCH if self._outside else 1
        self._recognizers = [
            Recognizer(RegionPredictor(self._pipeline()), self._shared) for _ in range(workers)
        ]
        self._pool = ThreadPoolExecutor(workers) if self._outside else None
        self._spare = list(self._recognizers)
        self._metrics = _Metrics(args["model_name"])
        log(
            "ready",
            model=args["model_name"],
            graphs=values["run_graphs"],
            runtime=values["runtime"],
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request. Each picture of a request is a question of its own."""
        if self._pool is None or len(requests) == 1:
            answers = [self._answer(request) for request in requests]
        else:
            answers = list(self._pool.map(self._answer, requests))
        self._metrics.set_gauges(self._shared)
        return answers

    def finalize(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _answer(self, request: Any) -> Any:
        counts = Counts()
        try:
            questions = Question.from_tensors(arrays_of(request, [field.name for field in INPUTS]))
            recognizer = self._spare.pop()
            try:
                found = [
                    recognizer.answer(question, counts, request.is_cancelled)
                    for question in questions
                ]
            finally:
                self._spare.append(recognizer)
            answers = [answer.to_tensors() for answer in found]
            return answer_of(
                {name: np.concatenate([one[name] for one in answers]) for name in answers[0]},
                request,
            )
        except Exception as error:
            counts.add("refusals")
            return refusal_of(error, request)
        finally:
            self._metrics.add(counts)

    def _make_shared(self, folder: Path) -> SharedState:
        values = self._values
        limits = Limits.from_json(values["limits"])
        names = values["vocabularies"]
        words = folder / "vocabularies" / values["target"]
        vocabularies = {name: read_vocabulary(words / f"{name}.npz") for name in names}
        encoder = None
        if "clip_text_encoder" in values["graphs"]:
            store = EmbeddingMemory(limits.max_cached_words)
            encoder = VocabularyEncoder(self._pipeline().text_encoder, store=store)
        return SharedState(limits, vocabularies, encoder, "sam_mask_decoder" in values["graphs"])

    def _pipeline(self) -> RegionPipeline:
        runtime, precision = self._values["runtime"], self._values["precision"]
        if not self._outside:
            return open_pipeline(self._repository, runtime, precision, device="cpu")
        manifest, on_gpu = Manifest.load(self._repository), self._values["target"] != "cpu"

        def entry(graph: str) -> GraphEntry:
            return manifest.find(graph, self._values["format"], precision)

        return RegionPipeline(
            manifest.model,
            lambda graph: BlsRunner(entry(graph).spec, on_gpu),
            runtime=f"triton {runtime}",
            precision=precision,
            fingerprint=lambda graph: entry(graph).sha256 or "",
            text_input=manifest.text_input,
            **(SIZES_ON_GPU if on_gpu else SIZES_ON_CPU),
        )


class _Metrics:
    """Counters and gauges among Triton's own, under the prefix `regionspot_`."""

    def __init__(self, model: str) -> None:
        def family(name: str, text: str, kind: Any) -> Any:
            return pb_utils.MetricFamily(name=f"regionspot_{name}", description=text, kind=kind)

        kinds = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        self._families = {
            f"{name}_total": family(f"{name}_total", text, kinds[0])
            for name, text in COUNTERS.items()
        }
        self._families |= {name: family(name, text, kinds[1]) for name, text in GAUGES.items()}
        self._metrics = {
            name: one.Metric(labels={"model": model}) for name, one in self._families.items()
        }
        self._evictions = 0

    def add(self, counts: Counts) -> None:
        for name, amount in counts.values.items():
            self._metrics[f"{name}_total"].increment(amount)

    def set_gauges(self, shared: SharedState) -> None:
        images = shared.images
        self._metrics["image_cache_bytes"].set(images.size_bytes)
        self._metrics["image_cache_pictures"].set(len(images))
        self._metrics["image_cache_evictions_total"].increment(images.evictions - self._evictions)
        self._evictions = images.evictions
