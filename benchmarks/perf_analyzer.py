"""Triton's own load generator, `perf_analyzer`, on the same questions: what a client in C++ sees of
the same server.

It lies in the `tritonclient` wheels for Linux on x86-64 up to 2.50, in
`tritonclient-*.data/data/bin`, and needs `libb64.so.0d` (Debian's libb64-0d) and `libcudart.so.12`
(nvidia-cuda-runtime-cu12), which they do not have in them.
"""

from __future__ import annotations

import base64
import csv
import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regionspot.errors import InputError
from regionspot.serving.contract import DEFAULT_TOP_K, MODEL
from regionspot.structures import FloatArray

MIN_REQUESTS, MAX_REQUESTS = 20, 500
SPARE = 16
"""Pictures that are new in each request must not run out, should it send a few more than it
counts.
"""

TIMEOUT_S = 600.0
_MILLISECONDS = {
    "mean_ms": "Avg latency",
    "p50_ms": "p50 latency",
    "p90_ms": "p90 latency",
    "p99_ms": "p99 latency",
    "server_queue_ms": "Server Queue",
    "server_compute_infer_ms": "Server Compute Infer",
}
"""Our name -> the column, which is in microseconds."""


def check_binary(binary: str) -> None:
    """Raises InputError unless it can be started."""
    try:
        done = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--perf-analyzer {binary} cannot be started: {error}") from error
    if "Perf Analyzer" not in done.stdout + done.stderr:
        raise InputError(
            f"--perf-analyzer {binary} cannot be used: {_last_line(done.stderr)}; it needs "
            "libb64.so.0d (apt-get install libb64-0d) and libcudart.so.12 (of "
            "nvidia-cuda-runtime-cu12) where LD_LIBRARY_PATH finds them"
        )


def input_data(
    images: Iterable[bytes | str], boxes: Sequence[FloatArray], vocabulary: str, return_masks: bool
) -> dict[str, Any]:
    """The content of a file for `--input-data`: a request for each of `images`.

    Args:
        images: encoded pictures, or the handles of pictures that the server knows.
        boxes: (n, 4) for each picture; used again from the first one on where there are more
            images.
        vocabulary: a registered one's name.
    """
    requests = []
    for index, image in enumerate(images):
        regions = boxes[index % len(boxes)]
        request: dict[str, Any] = {
            "boxes": {"content": regions.ravel().tolist(), "shape": list(regions.shape)},
            "vocabulary": {"content": [vocabulary], "shape": [1]},
            "top_k": {"content": [DEFAULT_TOP_K], "shape": [1]},
            "return_masks": {"content": [return_masks], "shape": [1]},
        }
        if isinstance(image, str):
            request["image_handle"] = {"content": [image], "shape": [1]}
        else:  # as Triton sends BYTES: each value behind its length
            raw = len(image).to_bytes(4, "little") + image
            request["image"] = {"content": {"b64": base64.b64encode(raw).decode()}, "shape": [1]}
        requests.append(request)
    return {"data": requests}


def run(
    binary: str, url: str, data: Mapping[str, Any], count: int, concurrency: int
) -> dict[str, Any]:
    """Send `count` requests of `data` in a closed loop; the figures under the names of our own
    rows. What it achieved are `concurrency` requests in the mean time of one.

    Where it fails, `error` says why in their place: what was measured before is not lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        questions, table = Path(folder, "questions.json"), Path(folder, "table.csv")
        questions.write_text(json.dumps(data))
        command = [
            binary,
            "-m",
            MODEL,
            "-u",
            url,
            "-i",
            "grpc",
            "-b",
            "1",
            "--input-data",
            str(questions),
        ]
        command += [
            "--concurrency-range",
            str(concurrency),
            "--request-count",
            str(count),
            "-f",
            str(table),
            "--verbose-csv",
        ]
        head = {"concurrency": concurrency, "n": count}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return head | {"error": str(error)}
        if done.returncode or not table.is_file():
            return head | {"error": f"exit status {done.returncode}: {_last_line(done.stderr)}"}
        found = figures(table.read_text())
        return head | {"achieved_per_s": round(1000 * concurrency / found["mean_ms"], 2)} | found


def figures(table: str) -> dict[str, float]:
    """Milliseconds out of the CSV that it writes, one row below the names of its columns.

    Its own "Inferences/Second" is left alone: asked for a number of requests it divides by whole
    seconds, rounded up.
    """
    (row,) = csv.DictReader(table.splitlines())
    return {name: round(float(row[column]) / 1000, 2) for name, column in _MILLISECONDS.items()}


def _last_line(text: str) -> str:
    return next(
        (line.strip() for line in reversed(text.splitlines()) if line.strip()), "it gave no reason"
    )
