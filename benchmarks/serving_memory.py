"""How much memory a gateway and a server take at their worst: what the limits of `serving/deploy`
are chosen by.

    python -m regionspot.benchmarks.serving_memory --artifacts artifacts

starts a server on free ports of this machine, and a gateway in front of it with the settings of the
Helm chart. The gateway gets as many uploads at once as it lets in, each of the largest size; the
server as many of the largest images at once as it works on, which are small as files: a PNG of one
color with 16 bits a channel takes 8 bytes a pixel to decode. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.memory import MIB, proportional_bytes, status_bytes, tree_of
from regionspot.files import write_atomically
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import MAX_BATCH, Limits, ServingError
from regionspot.serving.environment import default_home
from regionspot.serving.records import running_server
from regionspot.serving.repository import (
    GRAPHS_IN_TRITON,
    GRAPHS_INSIDE,
    RepositoryOptions,
    make_repository,
)
from regionspot.tables import text_table

RESULT = Path(__file__).parent / "results" / "serving_memory.json"
CONCURRENCY, MAX_WAITING = 8, 32
"""Of a gateway of the Helm chart."""

WAVES = 2
SAMPLE_S = 0.1
WORDS = ["a", "b"]
BOX = [8.0, 8.0, 56.0, 56.0]
START_S = 60.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regionspot.benchmarks.serving_memory",
        description="Measure the memory that a gateway and a server take at their worst.",
    )
    parser.add_argument("--artifacts", required=True, metavar="DIR", help="from regionspot-export")
    parser.add_argument("--home", type=Path, metavar="DIR", help="where the Triton server is kept")
    parser.add_argument(
        "--out", type=Path, default=RESULT, metavar="FILE", help="default: %(default)s"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    home = arguments.home or default_home()
    with tempfile.TemporaryDirectory() as folder:
        servers, gateway = [], {}
        for graphs in (GRAPHS_INSIDE, GRAPHS_IN_TRITON):
            repository = Path(folder) / graphs
            make_repository(arguments.artifacts, repository, RepositoryOptions(graphs=graphs))
            with running_server(repository, home) as record:
                limits = _limits_of(record.ports.grpc_url)
                servers.append(
                    {"graphs": graphs, **measure_server(record.pid, record.ports.grpc_url, limits)}
                )
                if graphs == GRAPHS_INSIDE:
                    gateway = measure_gateway(record.ports.grpc_url, limits, Path(folder))
    command = "python -m regionspot.benchmarks.serving_memory --artifacts artifacts"
    found = {
        "command": command,
        "conditions": conditions(),
        "gateway": gateway,
        "servers": servers,
    }
    write_atomically(arguments.out, (json.dumps(found, indent=1) + "\n").encode())
    rows = [["gateway", f"{gateway['peak_mib']:.0f}"]]
    rows += [[f"server, graphs {one['graphs']}", f"{one['peak_mib']:.0f}"] for one in servers]
    print(text_table(["at its worst", "MiB"], rows))
    return 0


def measure_server(supervisor: int, url: str, limits: Limits) -> dict[str, Any]:
    """The largest images, MAX_BATCH of them at once.

    Returns:
        peak_mib of the supervisor, the server and all that they started, together and with shared
        memory; largest_process_mib of the largest of these alone.
    """
    side = math.isqrt(limits.max_image_pixels)
    images = [plain_png(side, shade) for shade in range(MAX_BATCH)]  # equal ones decode once

    def ask(image: bytes) -> str:
        with RegionClient(url, timeout_s=600, retry=False) as client:
            try:
                client.recognize(image, [BOX], WORDS)
            except ServingError as error:  # a refusal took memory as well
                return error.code
        return "OK"

    with PeakOfTree(supervisor) as peak, ThreadPoolExecutor(MAX_BATCH) as pool:
        codes = list(pool.map(ask, images))
    return {
        "images": MAX_BATCH,
        "image": f"{side} x {side}, 64 bits a pixel, {len(images[0])} bytes",
        "codes": {code: codes.count(code) for code in sorted(set(codes))},
        "peak_mib": round(peak.total / MIB, 1),
        "largest_process_mib": round(peak.largest / MIB, 1),
    }


def measure_gateway(url: str, limits: Limits, folder: Path) -> dict[str, Any]:
    """The largest uploads, as many at once as the gateway lets in.

    Returns:
        peak_mib of the gateway's process.
    """
    token = folder / "token"
    token.write_text("measured-by-this-benchmark\n")
    body = upload(noisy_png(limits.max_image_bytes))
    uploads = CONCURRENCY + MAX_WAITING
    with _gateway(url, token) as (process, port):
        statuses: list[int] = []
        for _ in range(WAVES):
            with ThreadPoolExecutor(uploads) as pool:
                statuses += pool.map(lambda _: _send(port, body, token), range(uploads))
        peak = status_bytes(process.pid)["VmHWM"]
    return {
        "concurrency": CONCURRENCY,
        "max_waiting": MAX_WAITING,
        "uploads_at_once": uploads,
        "upload_bytes": sum(len(part) for part in body),
        "statuses": {str(status): statuses.count(status) for status in sorted(set(statuses))},
        "peak_mib": round(peak / MIB, 1),
    }


class PeakOfTree:
    """The most memory of a process and its descendants while a `with` block runs.

    Attributes:
        total: bytes of all of them together; pages that several share count once.
        largest: bytes resident in the largest of them alone.
    """

    def __init__(self, pid: int) -> None:
        self.total = self.largest = 0
        self._root = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PeakOfTree:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            total = 0
            for pid in tree_of(self._root):
                with contextlib.suppress(OSError, KeyError):  # it ended meanwhile
                    total += proportional_bytes(pid)
                    self.largest = max(self.largest, status_bytes(pid)["VmHWM"])
            self.total = max(self.total, total)


def plain_png(side: int, shade: int) -> bytes:
    """One color, RGBA with 16 bits a channel: 8 bytes a pixel once decoded, hardly any before."""
    packer = zlib.compressobj(9)
    row = b"\0" + bytes([shade]) * (8 * side)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def noisy_png(max_bytes: int) -> bytes:
    """RGB noise, whose file has nearly as many bytes as are allowed."""
    side = math.isqrt((max_bytes - MIB) // 3)
    rows = np.random.default_rng(0).integers(0, 256, (side, 1 + 3 * side), np.uint8)
    rows[:, 0] = 0  # no filter
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(rows.tobytes(), 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def upload(image: bytes) -> list[bytes]:
    """The body of POST /v1/recognize, in parts so that the image is not copied."""
    question = json.dumps({"boxes": [BOX], "words": WORDS})
    head = (
        "--boundary\r\nContent-Disposition: form-data; name=request\r\n\r\n"
        f"{question}\r\n--boundary\r\n"
        'Content-Disposition: form-data; name=image; filename="image.png"\r\n\r\n'
    )
    return [head.encode(), image, b"\r\n--boundary--\r\n"]


def _send(port: int, body: Sequence[bytes], token: Path) -> int:
    """The status of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {
        "Content-Type": "multipart/form-data; boundary=boundary",
        "Content-Length": str(sum(len(part) for part in body)),
        "Authorization": f"Bearer {token.read_text().strip()}",
    }
    with contextlib.closing(connection):
        connection.request("POST", "/v1/recognize", body=iter(body), headers=headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status


@contextlib.contextmanager
def _gateway(url: str, token: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`regionspot-serve web` in a process of its own, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--url", url, "--port", str(port), "--token-file", str(token), "--timeout", "600"]
    options += ["--concurrency", str(CONCURRENCY), "--max-waiting", str(MAX_WAITING)]
    process = subprocess.Popen(
        [sys.executable, "-m", "regionspot.cli.main", "serve", "web", *options],
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield process, port
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise ServingError("UNAVAILABLE", "the gateway did not start")


def _limits_of(url: str) -> Limits:
    with RegionClient(url) as client:
        return client.info().limits


if __name__ == "__main__":
    sys.exit(main())
