"""What runs in a process of `image_decoder`: reads images off a pipe until it is closed."""

from __future__ import annotations

import contextlib
import json
import mmap
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from regionspot.errors import InputError
from regionspot.images import read_image
from regionspot.serving.contract import base64_hint
from regionspot.transforms import ClipTransform, EncoderInputs, SamTransform

FORMATS = ("JPEG", "PNG", "WEBP")
"""What is opened for strangers: of Pillow's decoders the ones that everybody uses."""

BYTES_PER_PIXEL = 40
"""Address space beside what the process starts with. A PNG of 16 bits with transparency, the worst
that was measured, takes 24 while it is converted.
"""

OOM_SCORE = 500
"""So that a system short of memory ends this process, and not the model's."""


def main(descriptor: str, pixels: str, settings: str) -> None:
    """Sends an empty message once it has started. Then answers each message, an encoded image, with
    a head in JSON, and with both images one after the other in the shared memory `pixels`; or with
    a head that has a refusal's `code` and `message`.
    """
    values = json.loads(settings)
    shared = mmap.mmap(int(pixels), 0)
    sam, clip = SamTransform(values["sam_image_size"]), ClipTransform(values["clip_image_size"])
    _limit_memory(values["max_pixels"])
    with Connection(int(descriptor)) as pipe, contextlib.suppress(EOFError, OSError):
        pipe.send_bytes(b"")
        while True:
            found = _inputs_of(pipe.recv_bytes(), sam, clip, values["max_pixels"])
            pipe.send_bytes(json.dumps(_told(found, shared)).encode())


def _inputs_of(
    image: bytes, sam: SamTransform, clip: ClipTransform, max_pixels: int
) -> EncoderInputs | dict[str, str]:
    """What the encoders take, or the refusal."""
    try:
        return EncoderInputs.of(read_image(image, max_pixels, formats=FORMATS), sam, clip)
    except InputError as error:
        code = "IMAGE_TOO_LARGE" if "is too large" in str(error) else "IMAGE_INVALID"
        return {"code": code, "message": f"{error}{base64_hint(image)}"}
    except MemoryError:
        return {
            "code": "IMAGE_TOO_LARGE",
            "message": "the image takes more memory to decode than the server allows: scale it "
            "down, or save it with 8 bits a channel",
        }


def _told(found: EncoderInputs | dict[str, str], shared: mmap.mmap) -> dict[str, Any]:
    """The head of an answer, whose images are put where they are shared."""
    if isinstance(found, dict):
        return found
    shared.seek(0)
    for array in (found.sam_image, found.clip_image):
        shared.write(array.tobytes())
    height, width = found.input_size
    return {
        "height": found.height,
        "width": found.width,
        "input_size": [int(height), int(width)],
    }


def _limit_memory(max_pixels: int) -> None:
    """Bounds the address space of this process, the first to end where memory is short."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    limit = now + (512 << 20) + BYTES_PER_PIXEL * max_pixels
    with contextlib.suppress(ValueError, OSError):  # a lower limit holds already
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
