"""The public model's contract: its tensors, limits and error codes. Server, client, gateway and
documentation share it.

Free of Triton and of PyTorch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from regionspot.errors import InputError, RegionSpotError, shown
from regionspot.runtime.runner import Array

MODEL = "regionspot"
"""The public model's name in Triton: encoded pictures in, names of regions out."""

TARGETS = ("cpu", "tensorrt", "onnxruntime")
"""What a repository is made for: Python and its own runtimes on a CPU, or Triton's backend of that
name on a GPU.
"""

MAX_BATCH = 8
"""Pictures of one request, and requests that a GPU's repository answers together."""

WORKERS = 2 * MAX_BATCH
"""Pictures that are worked on at once where the graphs are models of the server: while the encoders
have one batch, the next one is decoded and the one before is named.
"""

GPU_INDEX = 0
"""The GPU that engines and kept tensors are on, of those that the server sees."""

DEFAULT_TOP_K = 5
ANY_TOP_K = int(np.iinfo(np.int32).min)
"""What a client sends as `top_k` to leave it to the server."""


@dataclass(frozen=True)
class Field:
    """A tensor of the public model. Every shape has the pictures of the request in front: (B,
    *dims).

    Args:
        dtype: numpy's name, or "bytes".
        dims: -1 is any number of regions N, clicks P, words V or classes K.
        optional: of an input, whether it may be left out.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    meaning: str
    optional: bool = True


INPUTS = (
    Field("image", "bytes", (1,), "an encoded image: JPEG, PNG or WebP"),
    Field(
        "image_handle",
        "bytes",
        (1,),
        "instead of `image`: the handle that an earlier response returned",
    ),
    Field("boxes", "float32", (-1, 4), "N boxes, xyxy in pixels of the upright image"),
    Field(
        "points",
        "float32",
        (-1, -1, 2),
        "N regions of P points each, xy in pixels; they follow the boxes",
    ),
    Field(
        "point_labels", "int32", (-1, -1), "for each point: 1 foreground (default), 0 background"
    ),
    Field("vocabulary", "bytes", (1,), "name of a registered vocabulary"),
    Field("words", "bytes", (-1,), "instead of `vocabulary`: the V class names, UTF-8"),
    Field("top_k", "int32", (1,), f"number of best classes to return (default {DEFAULT_TOP_K})"),
    Field("return_masks", "bool", (1,), "also return each region's mask (default false)"),
)
STAGES = ("vocabulary", "decode", "instance", "encoders", "regions")
"""Of an image in the server: class names to embeddings, file to pixels, waiting for an instance of
the model, both image encoders, and prompts to classes and masks. Those that were skipped take 0 s.
"""

OUTPUTS = (
    Field("class_ids", "int32", (-1,), "best class of each region, an index into the vocabulary"),
    Field("class_names", "bytes", (-1,), "name of that class"),
    Field("scores", "float32", (-1,), "probability of that class, a softmax over the vocabulary"),
    Field("top_class_ids", "int32", (-1, -1), "K best classes of each region, best first"),
    Field("top_class_names", "bytes", (-1, -1), "their names"),
    Field("top_scores", "float32", (-1, -1), "their probabilities"),
    Field(
        "boxes",
        "float32",
        (-1, 4),
        "box of each region; for points, the box of the mask or of the points",
    ),
    Field("iou_predictions", "float32", (-1,), "SAM's estimate of the IoU of its mask"),
    Field(
        "masks",
        "bytes",
        (-1,),
        "compressed counts of a COCO RLE at the image's size; empty unless `return_masks`",
    ),
    Field("image_size", "int32", (2,), "height and width of the upright image"),
    Field("image_handle", "bytes", (1,), "send it instead of the same image to skip the encoders"),
    Field(
        "cached", "bool", (1,), "whether the encoders were skipped, because the image was cached"
    ),
    Field(
        "model_version",
        "bytes",
        (1,),
        "which model answered: the first digits of a hash of its graphs, tokenizer and templates",
    ),
    Field(
        "stage_seconds",
        "float32",
        (len(STAGES),),
        f"seconds that the image took in each stage, one after another: {', '.join(STAGES)}",
    ),
)

NO_SHARED_MEMORY = (
    "(?:Failed to increase the shared memory pool size|Unable to initialize shared memory key"
    "|Failed to create new mapped region)"
)
"""A regular expression: how Triton's messages begin where /dev/shm is full."""

CODES = {
    "REQUEST_INVALID": "the request does not match this contract: a tensor is missing, unknown, "
    "or of another type",
    "IMAGE_INVALID": "unsupported image format, or a corrupt file",
    "IMAGE_TOO_LARGE": "more bytes or pixels than the server accepts",
    "IMAGE_UNKNOWN": "no image with that handle is cached (any more): send the image",
    "REGION_INVALID": "a box or point that is malformed or outside the image",
    "TOO_MANY_REGIONS": "more regions than one request may have",
    "VOCABULARY_INVALID": "class names that are blank, repeated, too long or not UTF-8",
    "VOCABULARY_UNKNOWN": "no vocabulary with that name is registered",
    "TOO_MANY_WORDS": "more class names than the server accepts",
    "UNAUTHORIZED": "the gateway needs a bearer token, and got none or another",
    "FORBIDDEN": "the gateway does not take this request from this token, site or host name",
    "QUOTA_EXCEEDED": "the token was used for more than it may: retry later",
    "OVERLOADED": "too many requests are queued: retry later",
    "UNAVAILABLE": "the server cannot be reached, or is starting: retry",
    "TIMEOUT": "no response before the client's deadline",
    "INTERNAL": "the server failed; its log says why",
}
"""Stable codes, each at the beginning of its message: "REGION_INVALID: box 2 ..."."""

VERSION_DIGITS = 12


def version_of(texts: Sequence[str]) -> str:
    """Names a vocabulary, or whatever else some texts describe: the first digits of a SHA-256 of
    them, in their order.

    >>> version_of(["cat", "dog"]) == version_of(["dog", "cat"])
    False
    """
    content = json.dumps(list(texts), ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()[:VERSION_DIGITS]


MAX_MESSAGE_BYTES = 2000
"""gRPC carries an error in a header, of which clients take 16 KiB in all, percent-encoded."""

CUT_SIGN = " ..."

_CODED = re.compile(
    r"(?:\[request id: [^\]]*\] )?(?:in ensemble '[^']*', )?"
    rf"({'|'.join(CODES)}): (.*)",
    re.DOTALL,
)
"""What `as_text` writes, behind what Triton may put before it; a caller's words come later."""

RETRYABLE = ("QUOTA_EXCEEDED", "OVERLOADED", "UNAVAILABLE")


class ServingError(RegionSpotError):
    """A server's refusal or failure; `code` is one of CODES.

    `retry_after_s` is how many seconds the server asks to wait before the next attempt, None where
    it does not say.
    """

    def __init__(self, code: str, message: str) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code
        self.retry_after_s: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), str(self), self.__dict__)


class RequestError(ServingError, InputError):
    """What the caller can mend: the picture, the regions, the words."""


def _unpickled(kind: type[ServingError], message: str, state: dict[str, Any]) -> ServingError:
    """An error that comes out of another process, whatever its constructor takes."""
    error = kind.__new__(kind, message)
    error.__dict__.update(state)
    return error


def error_of(code: str, message: str) -> ServingError:
    """The exception of a code."""
    kind = ServingError if code in (*RETRYABLE, "TIMEOUT", "INTERNAL") else RequestError
    return kind(code, message)


def as_text(error: ServingError) -> str:
    """The form in which an error crosses the wire, at most MAX_MESSAGE_BYTES of UTF-8."""
    text = f"{error.code}: {error}"
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return text
    cut = encoded[: MAX_MESSAGE_BYTES - len(CUT_SIGN.encode())].decode("utf-8", "ignore")
    return cut + CUT_SIGN


def from_text(text: str) -> ServingError | None:
    """The error that `as_text` wrote, perhaps behind words of Triton's own; None where there is
    none.
    """
    found = _CODED.match(text)
    return error_of(found[1], found[2]) if found else None


@contextmanager
def coded(code: str = "REQUEST_INVALID") -> Iterator[None]:
    """Gives an InputError of the block a code; one that has a code keeps it."""
    try:
        yield
    except ServingError:
        raise
    except InputError as error:
        raise RequestError(code, str(error)) from error


def check_tensors(
    tensors: Mapping[str, Array], table: Sequence[Field], complete: bool = False
) -> int:
    """Checks the tensors of a message against INPUTS or OUTPUTS.

    Args:
        complete: refuse a message that lacks a tensor of the table.

    Returns:
        The number of images B that they are about, 0 without any tensor.

    Raises:
        InputError: a tensor is unknown, missing, of another type or shape, or not about as many
            images as the others.
    """
    known = {field.name: field for field in table}
    for name, array in tensors.items():
        if name not in known:
            raise InputError(f"there is no tensor {shown(name)}: send {', '.join(known)}")
        _check_tensor(array, known[name])
    missing = [name for name in known if name not in tensors]
    if complete and missing:
        raise InputError(f"tensors are missing: {', '.join(missing)}")
    batches = {name: len(array) for name, array in tensors.items()}
    if len(set(batches.values())) > 1:
        raise InputError(f"all tensors need the same number of images, got {batches}")
    return max(batches.values(), default=0)


def _check_tensor(array: Array, field: Field) -> None:
    dtype = np.dtype(object if field.dtype == "bytes" else field.dtype)
    if array.dtype != dtype:
        raise InputError(f"{field.name} must be of type {field.dtype}, not {array.dtype}")
    sized = array.ndim == len(field.dims) + 1 and all(
        dim in (-1, size) for dim, size in zip(field.dims, array.shape[1:], strict=True)
    )
    if not sized:
        dims = ", ".join("?" if dim == -1 else str(dim) for dim in field.dims)
        raise InputError(f"{field.name} must have shape (B, {dims}), got {array.shape}")
    if field.dtype == "bytes" and not all(isinstance(item, bytes) for item in array.flat):
        raise InputError(f"{field.name} must hold bytes and nothing else")


def to_utf8(text: object, what: str) -> bytes:
    """Encodes a name or a word for the wire.

    Raises:
        InputError: it is no text, or holds half of a surrogate pair, which JSON's escapes and file
            names can carry.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} must be text, not {type(text).__name__}: {shown(text)}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} {shown(text)} is no Unicode text: it holds half of a surrogate pair"
        ) from error


def base64_hint(content: bytes) -> str:
    """What to add to a refusal of picture bytes that are base64 text; nothing for others."""
    start = content.lstrip()[:256]
    if start.startswith(b"data:"):
        start = start.partition(b",")[2]
    try:
        head = base64.b64decode(start[:24], validate=True)
    except ValueError:
        return ""
    if not head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM")):
        return ""
    return (
        "; it is base64 text: decode it, and send the bytes themselves (over Triton's HTTP by its "
        "binary tensor data extension, since JSON cannot hold them)"
    )


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and sizes of the server's caches.

    Args:
        max_image_bytes: of the encoded image.
        max_image_pixels: of the image, checked against its header before any pixel is decoded.
        max_regions: of one image; the head attends to all of them at once.
        max_words: class names of a request.
        max_new_words: class names of a request that are not in the server's cache.
        max_word_length: characters of a class name.
        max_top_k: best classes to return.
        image_cache_mb: size of the cache of encoded images, in MB.
        max_cached_words: size of the cache of class names.
        max_decode_seconds: of processor time, for decoding one image.
        max_words_seconds: of learning the new class names of one request.
        max_request_seconds: of all work on one image.
    """

    max_image_bytes: int = 32 << 20
    max_image_pixels: int = 50_000_000
    max_regions: int = 300
    max_words: int = 2048
    max_new_words: int = 128
    max_word_length: int = 256
    max_top_k: int = 2048
    image_cache_mb: int = 1024
    max_cached_words: int = 100_000
    max_decode_seconds: int = 10
    max_words_seconds: int = 20
    max_request_seconds: int = 120

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name} must be 1 or more, not {getattr(self, field.name)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Limits:
        """What `to_json` wrote; a limit that this release does not know is left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: int(value) for key, value in content.items() if key in known})
