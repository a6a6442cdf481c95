"""Decodes and resizes images in processes of their own: each image within limits of processor time
and of memory, and a decoder that crashes costs its own image.

A decoder of images runs on strangers' bytes, and nothing can stop it in the middle: a progressive
JPEG of 500 kB may keep one busy for minutes. A process can be ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import mmap
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from regionspot.errors import ArtifactError
from regionspot.serving.backends.budget import POLL_S, Budget
from regionspot.serving.contract import RequestError, ServingError, error_of
from regionspot.structures import UInt8Array
from regionspot.transforms import EncoderInputs

logger = logging.getLogger(__name__)

START_S = 60.0
"""For a process to import what it needs, on a machine that is busy."""

PATIENCE_S = 1.0
"""A decoder whose request is cancelled is ended after this long: starting another costs time."""

_RUN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from regionspot.serving.backends.decoder_process import main; main(*sys.argv[2:])"
)


@dataclass(frozen=True)
class DecoderSettings:
    """What a process is told once.

    Args:
        sam_image_size, clip_image_size: sides S and S' of what is made of an image.
        max_pixels: larger images are refused by their header.
        cpu_s: an image that takes more processor time is refused.
    """

    sam_image_size: int
    clip_image_size: int
    max_pixels: int
    cpu_s: float


class _EndedError(Exception):
    """A process has ended while it decoded an image."""


class _NotStartedError(_EndedError):
    """A process has ended before it could decode anything."""


class ImageDecoder:
    """Several processes that decode. Safe for several threads at once. Close it, or use it as a
    context manager.

    Args:
        processes: how many images are decoded at the same time.
    """

    def __init__(self, settings: DecoderSettings, processes: int = 1) -> None:
        self._spare: SimpleQueue[_Process] = SimpleQueue()
        self._all = [_Process(settings) for _ in range(processes)]
        for process in self._all:
            process.start()  # they import side by side
            self._spare.put(process)

    def decode(self, image: bytes, budget: Budget) -> EncoderInputs:
        """An encoded image as the model's encoders take it.

        Raises:
            RequestError: IMAGE_INVALID or IMAGE_TOO_LARGE.
            ServingError: TIMEOUT, the request is over; UNAVAILABLE or INTERNAL, no process can be
                started.
        """
        process = self._take(budget)
        try:
            return process.decode(image, budget)
        finally:
            self._spare.put(process)

    def close(self) -> None:
        for process in self._all:
            process.close()

    def __enter__(self) -> ImageDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, budget: Budget) -> _Process:
        while True:
            budget.check()
            with contextlib.suppress(Empty):
                return self._spare.get(timeout=POLL_S)


class _Process:
    """One process; started again where it was ended. For one thread at a time."""

    def __init__(self, settings: DecoderSettings) -> None:
        self._settings = settings
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._is_ready, self._started = False, 0.0
        self._pixels = _SharedPixels((settings.sam_image_size, settings.clip_image_size))

    def start(self) -> None:
        """Starts it if it does not run; does not wait for it."""
        if self._child is not None and self._child.poll() is None:
            return
        self.stop()
        ours, theirs = Pipe()
        descriptor = theirs.fileno()
        command = [
            *(_python(), "-I", "-c", _RUN, json.dumps(sys.path)),
            *(str(descriptor), str(self._pixels.descriptor), json.dumps(asdict(self._settings))),
        ]
        passed = (descriptor, self._pixels.descriptor)
        with theirs:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, cwd="/", pass_fds=passed
            )
        self._pipe, self._started = ours, time.monotonic()

    def stop(self) -> None:
        """Ends it at once. Raises nothing."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._is_ready = False
        self._child = self._pipe = None

    def close(self) -> None:
        """Ends it for good."""
        self.stop()
        self._pixels.close()

    def decode(self, image: bytes, budget: Budget) -> EncoderInputs:
        """See `ImageDecoder.decode`. Tries again where the process ends: it may have been killed,
        by somebody or because memory was short, and not by the image.
        """
        try:
            return self._decode_once(image, budget)
        except _EndedError as error:
            logger.warning("a decoder ended by itself (%s)", error)
        try:
            return self._decode_once(image, budget)
        except _NotStartedError as error:
            raise ServingError("UNAVAILABLE", "no image can be decoded: retry later") from error
        except _EndedError as error:
            logger.warning("another one ended with the same image (%s)", error)
            raise RequestError(
                "IMAGE_INVALID", "the image cannot be decoded: its decoder failed; save it again"
            ) from error

    def _decode_once(self, image: bytes, budget: Budget) -> EncoderInputs:
        """Raises _EndedError where the process ended meanwhile."""
        pipe = self._ready(budget)
        try:
            pipe.send_bytes(image)
            self._wait(pipe, budget)
            found = self._received(json.loads(pipe.recv_bytes()))
        except (OSError, EOFError) as error:
            status = None if self._child is None else self._child.poll()
            self.stop()
            raise _EndedError(f"status {status}") from error
        except BaseException:
            self.stop()  # the next image must not get this one's answer
            raise
        if isinstance(found, ServingError):
            raise found
        return found

    def _ready(self, budget: Budget) -> Connection:
        """The pipe to the process, once it has started.

        Raises:
            _NotStartedError: it ended before it had, or takes longer than START_S.
            ServingError: TIMEOUT, the request is over; INTERNAL, there is no Python.
        """
        try:
            self.start()
            assert self._pipe is not None
            while not self._is_ready:
                if self._pipe.poll(POLL_S):
                    self._pipe.recv_bytes()
                    self._is_ready = True
                elif time.monotonic() - self._started > START_S:
                    raise OSError(f"it has not started within {START_S:g} s")
                else:
                    budget.check()
        except (OSError, EOFError) as error:
            self.stop()
            raise _NotStartedError(str(error) or "it ended at once") from error
        except ArtifactError as error:
            raise ServingError("INTERNAL", "no image can be decoded") from error
        return self._pipe

    def _wait(self, pipe: Connection, budget: Budget) -> None:
        """Returns when there is an answer.

        Raises:
            RequestError: IMAGE_TOO_LARGE, the image takes too long.
            ServingError: TIMEOUT, the request is over.
        """
        began, limit_s = time.monotonic(), self._settings.cpu_s
        used_before_s = self._cpu_seconds()
        while not pipe.poll(POLL_S):
            took_s = time.monotonic() - began
            # by the clock, a machine that has much to do would refuse what it takes at other times
            if self._cpu_seconds() - used_before_s > limit_s:
                raise RequestError(
                    "IMAGE_TOO_LARGE",
                    f"the image takes more than {limit_s:g} s to decode: scale it down, or save it "
                    "as a baseline JPEG",
                )
            if took_s > PATIENCE_S:
                budget.check()

    def _cpu_seconds(self) -> float:
        """The processor time that the process has used; 0 where it has ended."""
        assert self._child is not None
        try:
            stat = Path(f"/proc/{self._child.pid}/stat").read_text()
        except OSError:
            return 0.0
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _received(self, head: dict[str, Any]) -> EncoderInputs | ServingError:
        """See `decoder_process.main` for the other side."""
        if "code" in head:
            return error_of(head["code"], head["message"])
        sam_image, clip_image = self._pixels.images()
        height, width = head["input_size"]
        return EncoderInputs(head["height"], head["width"], sam_image, (height, width), clip_image)


class _SharedPixels:
    """Memory shared with a process, for square images of some sizes: through a pipe, each would be
    cut into pieces that the processes wait for in turn. The other side cannot make it smaller.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._shapes = [(size, size, 3) for size in sizes]
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        self.descriptor = os.memfd_create("regionspot-pixels", flags)
        length = sum(map(math.prod, self._shapes))
        os.ftruncate(self.descriptor, length)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
        self._memory = mmap.mmap(self.descriptor, length)

    def images(self) -> list[UInt8Array]:
        """Copies of what lies there, (S, S, 3) each."""
        found, start = [], 0
        for shape in self._shapes:
            count = math.prod(shape)
            array = np.frombuffer(self._memory, np.uint8, count, start)
            found.append(array.reshape(shape).copy())
            start += count
        return found

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)


def _python() -> str:
    """This Python's interpreter. Inside of Triton, Python is a library of another program.

    Raises:
        ArtifactError: there is none.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    own = Path(sys.prefix) / "bin" / version
    found = str(own) if os.access(own, os.X_OK) else shutil.which(version)
    if found is None:
        raise ArtifactError(f"there is no {version} on the PATH, which decoding images needs")
    return found
