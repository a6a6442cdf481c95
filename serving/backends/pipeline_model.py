"""The public model of Triton's Python backend: `Recognizer` behind requests, with metrics."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock, Semaphore
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from regionspot.cgroups import memory_bytes
from regionspot.files import cache_root
from regionspot.predictor import RegionPredictor
from regionspot.runtime.artifacts import GraphEntry, Manifest
from regionspot.runtime.formats import NATIVE
from regionspot.runtime.opening import open_pipeline
from regionspot.runtime.pipeline import SIZES_ON_CPU, SIZES_ON_GPU, RegionPipeline
from regionspot.serving.backends.bls import BlsRunner
from regionspot.serving.backends.exchange import Exchange
from regionspot.serving.backends.image_decoder import DecoderSettings, ImageDecoder
from regionspot.serving.backends.instances import Instances, cpu_instances
from regionspot.serving.backends.recognizer import Counts, Recognizer, SharedState, read_vocabulary
from regionspot.serving.backends.requests import arrays_of, log
from regionspot.serving.contract import INPUTS, WORKERS, Limits
from regionspot.serving.messages import Answer, Question
from regionspot.structures import Vocabulary
from regionspot.threads import default_threads
from regionspot.vocabulary import EmbeddingDirectory, EmbeddingMemory, VocabularyEncoder

DECODERS = 2
"""Images that are decoded at once, at least: while one takes long, others go past it."""

COUNTERS = {
    "image_cache_hits": "questions about pictures that were encoded before",
    "image_cache_misses": "questions about pictures that were not",
    "image_cache_evictions": "pictures that were forgotten to make room",
    "words_encoded": "words that went through the text encoder",
    "regions": "regions that were named",
    "refusals": "pictures that were answered with an error",
    "decode_seconds": "seconds in decoding and resizing pictures, waiting for a decoder included",
    "instance_seconds": "seconds of waiting for an instance of the model",
    "encoders_seconds": "seconds in both image encoders",
    "vocabulary_seconds": "seconds in looking words up and encoding them",
    "regions_seconds": "seconds in the token decoder, the head and the masks",
}
GAUGES = {
    "image_cache_bytes": "held for encoded pictures",
    "image_cache_pictures": "pictures that are held",
}


class TritonPythonModel:
    """On a CPU it runs the graphs itself, in several instances side by side (see `cpu_instances`).
    Elsewhere the graphs are models of the same server, and Triton batches in the encoders' models
    what up to WORKERS images ask of them, of one request or of several.

    A request is answered as soon as its own images are, and none waits for another's: see
    `execute`.
    """

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        values = {
            name: json.loads(value["string_value"]) for name, value in config["parameters"].items()
        }
        self._repository = Path(args["model_repository"]).parent
        self._manifest = Manifest.load(self._repository)
        self._values, self._outside = values, values["run_graphs"] == "triton"
        folder = Path(args["model_repository"]) / args["model_version"]
        self._shared = self._make_shared(folder)
        instances = self._instances()
        # so that decoders have work while all instances have
        at_once = WORKERS if self._outside else 2 * len(instances) + DECODERS
        info, limits = self._manifest.model, self._shared.limits
        self._decoder = ImageDecoder(
            DecoderSettings(
                info.sam_image_size,
                info.clip_image_size,
                limits.max_image_pixels,
                limits.max_decode_seconds,
            ),
            max(DECODERS, len(instances)),
        )
        self._recognizer = Recognizer(instances, self._decoder, self._shared)
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="images")
        self._places = Semaphore(at_once)
        self._metrics = _Metrics(args["model_name"], self._shared)
        log(
            "ready",
            model=args["model_name"],
            graphs=values["run_graphs"],
            runtime=values["runtime"],
            instances=len(instances),
        )

    def execute(self, requests: list[Any]) -> None:
        """Takes requests on, each image as a question of its own. Waits while there are as many
        images at work as may be: those behind stay in Triton's queue, where they can be counted
        and cancelled.

        Where Triton batches in the graphs' models, it returns when the last of the images is
        encoded. So the encoders have one batch while Triton gathers the next, and the prompts and
        masks of a batch hold up no other.
        """
        encoded: list[Event] = []
        for request in requests:
            exchange = Exchange(request)
            try:
                tensors = arrays_of(request, [field.name for field in INPUTS])
                questions = Question.from_tensors(tensors)
            except Exception as error:
                exchange.refuse(error)
                self._metrics.add(exchange.counts)
                continue
            exchange.expect(len(questions))
            for index, question in enumerate(questions):
                encoded.append(Event())
                self._places.acquire()
                self._pool.submit(self._work, exchange, index, question, encoded[-1])
        if self._outside:
            for event in encoded:
                event.wait()

    def finalize(self) -> None:
        self._pool.shutdown()
        self._decoder.close()
        self._shared.close()

    def _work(self, exchange: Exchange, index: int, question: Question, encoded: Event) -> None:
        counts = Counts()
        try:
            found: Answer | Exception = self._recognizer.answer(
                question, counts, exchange.is_cancelled, encoded.set
            )
        except Exception as error:
            found = error
        finally:
            exchange.counts.merge(counts)
            encoded.set()
            self._places.release()
        if exchange.complete(index, found):
            self._metrics.add(exchange.counts)

    def _make_shared(self, folder: Path) -> SharedState:
        values = self._values
        limits = Limits.from_json(values["limits"])
        names = values["vocabularies"]
        words = folder / "vocabularies" / values["target"]
        vocabularies = {name: read_vocabulary(words / f"{name}.npz") for name in names}
        encoder = None
        if "clip_text_encoder" in values["graphs"]:
            text_encoder = self._pipeline(threads=1).text_encoder
            kept = EmbeddingDirectory.of(
                text_encoder, text_encoder.templates, cache_root() / "server-words"
            )
            store = EmbeddingMemory(limits.max_cached_words, kept)
            encoder = VocabularyEncoder(text_encoder, store=store)
        return SharedState(
            limits,
            vocabularies,
            encoder,
            "sam_mask_decoder" in values["graphs"],
            values.get("model_version", ""),
        )

    def _instances(self) -> Instances:
        if self._outside:
            return Instances([RegionPredictor(self._pipeline()) for _ in range(WORKERS)])
        formats = (self._values["format"], NATIVE)
        weight_bytes = sum(
            (self._repository / name).stat().st_size
            for entry in self._manifest.graphs
            for name in entry.files
            if entry.format in formats
        )
        chosen = cpu_instances(os.environ, default_threads(), weight_bytes, memory_bytes())
        side_by_side = [self._warm(chosen.threads) for _ in range(chosen.instances)]
        if chosen.instances == 1:
            return Instances(side_by_side)
        return Instances(side_by_side, self._warm(chosen.all_threads))

    def _warm(self, threads: int) -> RegionPredictor:
        """A predictor that has opened and run every graph that an image takes, so that no request
        waits for that.
        """
        predictor = RegionPredictor(self._pipeline(threads))
        size = self._manifest.model.embed_dim
        nothing = Vocabulary(("nothing",), np.full((1, size), size**-0.5, np.float32))
        predictor.predict(
            np.zeros((64, 64, 3), np.uint8),
            boxes=[[8, 8, 56, 56]],
            vocabulary=nothing,
            return_masks=self._shared.draws_masks,
        )
        return predictor

    def _pipeline(self, threads: int | None = None) -> RegionPipeline:
        runtime, precision = self._values["runtime"], self._values["precision"]
        if not self._outside:
            return open_pipeline(self._repository, runtime, precision, threads, device="cpu")
        manifest, on_gpu = self._manifest, self._values["target"] != "cpu"

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

    def __init__(self, model: str, shared: SharedState) -> None:
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
        self._shared, self._evictions = shared, 0
        self._lock = Lock()

    def add(self, counts: Counts) -> None:
        """Adds what one request came to, and looks at the cache of pictures. Safe for several
        threads at once.
        """
        images = self._shared.images
        with self._lock:
            for name, amount in counts.values.items():
                self._metrics[f"{name}_total"].increment(amount)
            evicted, self._evictions = images.evictions - self._evictions, images.evictions
            self._metrics["image_cache_evictions_total"].increment(evicted)
            self._metrics["image_cache_bytes"].set(images.size_bytes)
            self._metrics["image_cache_pictures"].set(len(images))
