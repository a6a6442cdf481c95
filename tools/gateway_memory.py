"""The gateway's memory at its peak, while many large images are uploaded at once.

python -m tools.gateway_memory --url 127.0.0.1:8001 -- --concurrency 8 --max-waiting 32

starts a gateway with the options behind `--`, sends it two waves of uploads, and prints a line of
JSON: the peak of its resident memory after each wave, and how many requests got which status.
"""

from __future__ import annotations

import argparse
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

QUESTION = json.dumps({"boxes": [[1, 1, 60, 60]], "words": ["cat", "dog"]})
WAVES = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gateway_memory", description=__doc__)
    parser.add_argument("--url", default="127.0.0.1:8001", help="of the Triton server")
    parser.add_argument("--uploads", type=int, default=40, help="at once (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=31, help="of each (%(default)s)")
    parser.add_argument("options", nargs="*", help="of `regionspot-serve web`, behind --")
    arguments = parser.parse_args(argv)
    port = free_port()
    command = [sys.executable, "-m", "regionspot.cli.main", "serve", "web"]
    command += ["--url", arguments.url, "--port", str(port), *arguments.options]
    gateway = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        print(json.dumps(measure(gateway.pid, port, arguments.uploads, arguments.megabytes)))
    finally:
        gateway.terminate()
        gateway.wait()
    return 0


def measure(pid: int, port: int, uploads: int, megabytes: int) -> dict[str, object]:
    """MiB at rest and at the peak after each wave, and the number of answers of each status, 0 for
    none.
    """
    wait_for(port)
    at_rest = peak_mib(pid)
    peaks, statuses = [], Counter[int]()
    for wave in range(WAVES):
        with ThreadPoolExecutor(uploads) as pool:
            bodies = (upload(port, f"{wave}-{number}", megabytes) for number in range(uploads))
            statuses.update(pool.map(send, bodies))
        peaks.append(peak_mib(pid))
    return {"at_rest_mib": at_rest, "peak_mib": peaks, "statuses": statuses}


def upload(port: int, name: str, megabytes: int) -> urllib.request.Request:
    """A question about an image that no other request sends: a small one, and much behind its
    end.
    """
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(file, "JPEG", comment=name.encode())
    image = file.getvalue().ljust(megabytes * 1_000_000, b"\0")
    boundary = uuid.uuid4().hex
    form = f'--{boundary}\r\nContent-Disposition: form-data; name="request"\r\n\r\n{QUESTION}\r\n'
    form += f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = form.encode() + image + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return urllib.request.Request(f"http://127.0.0.1:{port}/v1/recognize", body, headers)


def send(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError:  # refused before all was sent
        return 0


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz?upstream=1", timeout=30)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def peak_mib(pid: int) -> int:
    """Of a process's resident memory, so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    raise RuntimeError(f"process {pid} has no memory")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
