"""A running server beside the same artefacts in this process: the same answers, and what the server
costs.

    python -m regionspot.benchmarks.serving --url 127.0.0.1:8001 --artifacts artifacts \\
        --data data/val.json

Measured are whole calls as a user makes them: from a JPEG's bytes to names and scores, without
masks. A "new" picture is one that the server has not met: each request's bytes differ by a comment
in the JPEG, which changes no pixel. A "known" one is asked about by its handle; in this process by
what `RegionPredictor.encode` gave. Exits with 1 if answers differ.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
import urllib.request
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.questions import never_seen
from regionspot.data.coco_json import CocoDataset
from regionspot.data.formats import load_dataset
from regionspot.errors import InputError
from regionspot.files import write_atomically
from regionspot.predictor import RegionPredictor
from regionspot.runtime.opening import open_pipeline
from regionspot.serving.client import AsyncRegionClient, RegionClient
from regionspot.serving.conversation import ServerInfo
from regionspot.structures import RegionPredictions, Vocabulary
from regionspot.tables import text_table
from regionspot.vocabulary import VocabularyEncoder

MAX_DIFFERENCE = 1e-4
CONCURRENCIES = (1, 4)
WARM_UP = 5


@dataclass(frozen=True)
class Sample:
    """A picture's file and the boxes to name in it, xyxy."""

    jpeg: bytes
    boxes: list[Any]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regionspot.benchmarks.serving",
        description="Compare a server with the same artefacts in here.",
    )
    parser.add_argument(
        "--url", default="127.0.0.1:8001", help="the server's gRPC port (%(default)s)"
    )
    parser.add_argument(
        "--http-url", metavar="URL", help="its HTTP port, to compare its answers too"
    )
    parser.add_argument("--web-url", metavar="URL", help="of `regionspot-serve web`, likewise")
    parser.add_argument(
        "--artifacts", required=True, metavar="DIR", help="what the server's repository was made of"
    )
    parser.add_argument(
        "--data", required=True, metavar="JSON", help="annotations of pictures, in COCO format"
    )
    parser.add_argument("--vocabulary", default="mini", help="a registered one (%(default)s)")
    parser.add_argument(
        "--requests", type=int, default=200, metavar="N", help="of each measurement (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    with RegionClient(arguments.url) as client:
        info = client.info()
    if arguments.vocabulary not in info.vocabularies:
        raise InputError(
            f"{arguments.url} has registered {', '.join(info.vocabularies)}, not "
            f"{arguments.vocabulary}"
        )
    samples = _samples(load_dataset(arguments.data))
    with open_pipeline(arguments.artifacts, info.runtime, info.precision) as pipeline:
        predictor = RegionPredictor(pipeline)
        encoder = VocabularyEncoder(pipeline.text_encoder)
        vocabulary = encoder.encode(info.vocabularies[arguments.vocabulary])
        report: dict[str, Any] = {"parity": compare(arguments, predictor, vocabulary, samples)}
        report["latency"] = measure(arguments, predictor, vocabulary, samples)
    report["conditions"] = _conditions(info, samples, arguments.requests)
    print(format_report(report))
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(report, indent=2) + "\n").encode())
    same = all(
        row["same_classes"] and row["max_score_difference"] <= MAX_DIFFERENCE
        for row in report["parity"].values()
    )
    return 0 if same else 1


def compare(
    arguments: argparse.Namespace,
    predictor: RegionPredictor,
    vocabulary: Vocabulary,
    samples: Sequence[Sample],
) -> dict[str, dict[str, Any]]:
    """Each way to the server -> how its answers differ from this process's."""
    expected = [_predict(predictor, sample, vocabulary) for sample in samples]
    ways: dict[str, Callable[[Sample], tuple[np.ndarray, np.ndarray]]] = {}
    clients = [RegionClient(url) for url in (arguments.url, arguments.http_url) if url]
    for name, client in zip(("gRPC", "HTTP"), clients, strict=False):
        ways[name] = lambda sample, client=client: _of(  # type: ignore[misc]
            client.recognize(sample.jpeg, sample.boxes, arguments.vocabulary)
        )
    if arguments.web_url:
        ways["web page's API"] = lambda sample: _ask_gateway(
            arguments.web_url, sample, arguments.vocabulary
        )
    rows = {}
    for name, ask in ways.items():
        classes, differences = [], [0.0]
        for sample, wanted in zip(samples, expected, strict=True):
            found_classes, found_scores = ask(sample)
            names = np.array(vocabulary.names)[wanted.class_ids]
            classes.append(np.array_equal(found_classes, names))
            differences.append(float(np.abs(found_scores - wanted.scores).max(initial=0)))
        rows[name] = {
            "pictures": len(samples),
            "regions": sum(len(sample.boxes) for sample in samples),
            "same_classes": all(classes),
            "max_score_difference": max(differences),
        }
    for client in clients:
        client.close()
    return rows


def measure(
    arguments: argparse.Namespace,
    predictor: RegionPredictor,
    vocabulary: Vocabulary,
    samples: Sequence[Sample],
) -> list[dict[str, Any]]:
    """Rows of latency: here and through the server, new and known pictures, at each concurrency."""
    count, rows = arguments.requests, []
    known = [predictor.encode(sample.jpeg) for sample in samples]
    for picture in ("new", "known"):
        seconds = []
        for index in range(WARM_UP + count):
            sample, encoded = samples[index % len(samples)], known[index % len(samples)]
            began = time.perf_counter()
            _predict(predictor, sample, vocabulary, None if picture == "new" else encoded)
            seconds.append(time.perf_counter() - began)
        rows.append(_row("in process", picture, 1, seconds[WARM_UP:], sum(seconds[WARM_UP:])))
    for picture in ("new", "known"):
        for concurrency in CONCURRENCIES:
            seconds, elapsed = asyncio.run(_load(arguments, samples, picture, concurrency))
            rows.append(_row("Triton", picture, concurrency, seconds, elapsed))
    return rows


async def _load(
    arguments: argparse.Namespace, samples: Sequence[Sample], picture: str, concurrency: int
) -> tuple[list[float], float]:
    """Seconds of each request of a closed loop, and of all of them together."""
    async with AsyncRegionClient(arguments.url) as client:
        known = [await client.encode(sample.jpeg) for sample in samples]
        numbers = itertools.count()

        def ask() -> Awaitable[Any]:
            index = next(numbers) % len(samples)
            sample = samples[index]
            image = known[index] if picture == "known" else never_seen(sample.jpeg)
            return client.recognize(image, sample.boxes, arguments.vocabulary)

        for _ in range(WARM_UP):
            await ask()
        seconds: list[float] = []

        async def worker() -> None:
            while len(seconds) < arguments.requests:
                began = time.perf_counter()
                await ask()
                seconds.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return seconds, time.perf_counter() - began


def format_report(report: Mapping[str, Any]) -> str:
    """Returns two tables for a terminal."""
    return f"{_parity_table(report['parity'])}\n\n{_latency_table(report['latency'])}"


def _parity_table(parity: Mapping[str, Mapping[str, Any]]) -> str:
    header = ("answers by", "pictures", "regions", "classes", "scores differ by")
    rows = []
    for name, row in parity.items():
        classes = "the same" if row["same_classes"] else "DIFFERENT"
        rows.append(
            (
                name,
                str(row["pictures"]),
                str(row["regions"]),
                classes,
                f"{row['max_score_difference']:.1e}",
            )
        )
    return text_table(header, rows, right=range(1, len(header)))


def _latency_table(latency: Sequence[Mapping[str, Any]]) -> str:
    header = ("where", "picture", "at once", "p50 ms", "p99 ms", "per second", "overhead ms")
    alone = {row["picture"]: row["p50_ms"] for row in latency if row["where"] == "in process"}
    rows = []
    for row in latency:
        figures = [f"{row[name]:.1f}" for name in ("p50_ms", "p99_ms", "per_second")]
        shown = row["where"] == "Triton" and row["concurrency"] == 1
        overhead = f"{row['p50_ms'] - alone[row['picture']]:.1f}" if shown else ""
        rows.append((row["where"], row["picture"], str(row["concurrency"]), *figures, overhead))
    return text_table(header, rows, right=range(2, len(header)))


def _samples(dataset: CocoDataset) -> list[Sample]:
    found = []
    for record in dataset.images:
        boxes = [list(annotation.box) for annotation in dataset.annotations_by_image[record.id]]
        found.append(Sample(dataset.image_path(record).read_bytes(), boxes))
    return found


def _predict(
    predictor: RegionPredictor, sample: Sample, vocabulary: Vocabulary, encoded: Any = None
) -> RegionPredictions:
    predictor.set_image(sample.jpeg if encoded is None else encoded)
    return predictor.predict(boxes=sample.boxes, vocabulary=vocabulary, return_masks=False)


def _of(found: RegionPredictions) -> tuple[np.ndarray, np.ndarray]:
    return np.array([found.class_names[index] for index in found.class_ids]), found.scores


def _ask_gateway(url: str, sample: Sample, vocabulary: str) -> tuple[np.ndarray, np.ndarray]:
    """One multipart request, as the page sends it."""
    boundary = uuid.uuid4().hex
    question = json.dumps({"boxes": sample.boxes, "vocabulary": vocabulary}).encode()
    parts = [
        ("request", "application/json", "", question),
        ("image", "image/jpeg", '; filename="p.jpg"', sample.jpeg),
    ]
    body = b"".join(
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n'
            f"Content-Type: {kind}\r\n\r\n"
        ).encode()
        + content
        + b"\r\n"
        for name, kind, more, content in parts
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(
        f"{url}/v1/recognize", body + f"--{boundary}--\r\n".encode(), headers
    )
    with urllib.request.urlopen(request) as response:
        regions = json.load(response)["regions"]
    return np.array([region["class"] for region in regions]), np.array(
        [region["score"] for region in regions]
    )


def _row(
    where: str, picture: str, concurrency: int, seconds: Sequence[float], elapsed_s: float
) -> dict[str, Any]:
    milliseconds = 1000 * np.array(seconds)
    return {
        "where": where,
        "picture": picture,
        "concurrency": concurrency,
        "n": len(seconds),
        "p50_ms": round(float(np.percentile(milliseconds, 50)), 2),
        "p99_ms": round(float(np.percentile(milliseconds, 99)), 2),
        "per_second": round(len(seconds) / elapsed_s, 2),
    }


def _conditions(info: ServerInfo, samples: Sequence[Sample], requests: int) -> dict[str, Any]:
    regions = sum(len(sample.boxes) for sample in samples)
    return conditions(
        model=info.model,
        runtime=info.runtime,
        precision=info.precision,
        requests=requests,
        warm_up=WARM_UP,
        regions_per_picture=round(regions / len(samples), 2),
        includes="JPEG decoding, both encoders, token decoder, head and top-k; no masks",
        client="asyncio over gRPC on the same machine; a closed loop",
    )


if __name__ == "__main__":
    sys.exit(main())
