"""From an HTTP request to a question: everything that can be refused before the model server is troubled.

A multipart form with two parts: `request`, JSON with the KEYS below, and `image`, a file, unless the JSON names a
handle.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from regionspot.serving.client import RemoteImage
from regionspot.serving.contract import DEFAULT_TOP_K, Limits, RequestError
from regionspot.serving.gateway.errors import HttpError
from regionspot.serving.gateway.picture import check_picture
from regionspot.structures import FloatArray

KEYS = ("boxes", "points", "point_labels", "vocabulary", "words", "top_k", "masks", "image_handle")
PARTS = ("image", "request")
FORM_SLACK_BYTES = 4 << 20
"""What a form may hold besides the picture; the largest JSON is 2048 words of 256 characters, escaped."""

_HANDLE = re.compile(r"[\x21-\x7e]{1,256}")
_MAX_FILE_NAME = 255


@dataclass(frozen=True, eq=False)
class Form:
    """What arrived: the JSON's text, and the picture's file if there is one."""

    request: str
    image: bytes | None
    file_name: str


@dataclass(frozen=True, eq=False)
class ParsedForm:
    """A question, as `regionspot.serving.client` takes it. `file_name` is the caller's, or "" with a handle."""

    image: bytes | RemoteImage
    file_name: str
    vocabulary: str | tuple[str, ...]
    regions: dict[str, FloatArray]
    top_k: int
    return_masks: bool

    @property
    def num_regions(self) -> int:
        return sum(len(values) for name, values in self.regions.items() if name != "point_labels")


def check_headers(request: Request, max_bytes: int) -> None:
    """Refuse by the header what need not be read.

    Raises:
        HttpError: 415 for another content type, 413 for a body that says it is too large.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "multipart/form-data":
        raise HttpError(
            "REQUEST_INVALID",
            "send a form: Content-Type must be multipart/form-data, with the parts image and request",
            415,
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large(max_bytes)


async def read_form(request: Request, max_bytes: int) -> Form:
    """Read a form into memory, counting its bytes as they come: what Content-Length says proves nothing.

    Raises:
        HttpError: 413 once it is too large.
        RequestError: no such form.
    """
    counted = Request(request.scope, _counting(request.receive, max_bytes))
    parser = _MemoryParser(request.headers, counted.stream(), max_files=2, max_fields=2, max_part_size=FORM_SLACK_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError("REQUEST_INVALID", f"the form cannot be read: {error.message}") from error
    except (ValueError, LookupError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError("REQUEST_INVALID", "the form cannot be read: its charset must be UTF-8") from error
    try:
        return await _form_of(form)
    finally:
        await form.close()


def asked_of(form: Form, limits: Limits) -> ParsedForm:
    """Check a form against the contract and the server's limits.

    Raises:
        RequestError: with the code that says why not.
    """
    content = _json(form.request)
    handle = content.get("image_handle")
    if (form.image is None) == (handle is None):
        raise _invalid('send either a picture as the part "image", or "image_handle" in the request')
    vocabulary = _vocabulary(content, limits)
    regions = _regions(content, limits)
    top_k, masks = content.get("top_k", DEFAULT_TOP_K), content.get("masks", False)
    if type(top_k) is not int or not 1 <= top_k <= limits.max_top_k:
        raise _invalid(f'"top_k" must be a whole number from 1 to {limits.max_top_k}')
    if not isinstance(masks, bool):
        raise _invalid('"masks" must be true or false')
    if form.image is not None:
        check_picture(form.image, limits)
        return ParsedForm(form.image, form.file_name, vocabulary, regions, top_k, masks)
    if not isinstance(handle, str) or not _HANDLE.fullmatch(handle):
        raise _invalid('"image_handle" must be what an earlier answer said, as text')
    return ParsedForm(RemoteImage(handle, 0, 0), "", vocabulary, regions, top_k, masks)


def too_large(max_bytes: int) -> HttpError:
    return HttpError("IMAGE_TOO_LARGE", f"the request has more than {max_bytes} bytes: scale the picture down")


class _MemoryParser(MultiPartParser):
    """Starlette's, without files on disk: bodies are bounded, and a container may have no place to write."""

    spool_max_size = 1 << 62


def _counting(receive: Any, max_bytes: int) -> Any:
    """ASGI's `receive`, which stops at too many bytes."""
    count = 0

    async def counting() -> Any:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > max_bytes:
            raise too_large(max_bytes)
        return message

    return counting


async def _form_of(form: FormData) -> Form:
    parts = dict(form)
    if unknown := sorted(set(parts) - set(PARTS)):
        raise _invalid(f"the form has a part {unknown[0][:64]!r} that is not known here: send {' and '.join(PARTS)}")
    if len(parts) < len(form.multi_items()):
        raise _invalid("a part of the form was sent twice: send each once")
    request, image = parts.get("request"), parts.get("image")
    if isinstance(request, UploadFile):  # curl -F request=@file
        request = (await request.read()).decode("utf-8", "replace")
    if request is None:
        raise _invalid(
            'the form has no part "request": send JSON in it, such as {"boxes": [[0, 0, 9, 9]], "words": ["cat"]}'
        )
    if isinstance(image, str):
        raise _invalid('the part "image" must be a file: give it a file name')
    if image is None:
        return Form(request, None, "")
    name = re.split(r"[/\\]", image.filename or "")[-1]
    return Form(request, await image.read(), name[:_MAX_FILE_NAME])


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise _invalid(f'the part "request" is no JSON{where}; NaN and Infinity are none either') from error
    if not isinstance(content, dict):
        raise _invalid('the part "request" must be a JSON object: {"boxes": ..., "words": ...}')
    if unknown := [key for key in content if key not in KEYS]:
        names = ", ".join(repr(key[:64]) for key in unknown[:5])
        raise _invalid(f"the request has keys that are not known here: {names}; known are {', '.join(KEYS)}")
    return {key: value for key, value in content.items() if value is not None}


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _vocabulary(content: dict[str, Any], limits: Limits) -> str | tuple[str, ...]:
    name, words = content.get("vocabulary"), content.get("words")
    if (name is None) == (words is None):
        raise _invalid('send either "words", a list, or "vocabulary", the name of a registered one')
    if name is not None:
        if not isinstance(name, str):
            raise _invalid('"vocabulary" must be a name')
        if not name or len(name) > limits.max_word_length or not _is_unicode(name):
            raise RequestError("VOCABULARY_UNKNOWN", "no vocabulary of that name is registered")
        return name
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _invalid('"words" must be a list of texts')
    if len(words) > limits.max_words:
        raise RequestError("TOO_MANY_WORDS", f"{len(words)} words are more than {limits.max_words}: send fewer")
    for index, word in enumerate(words):
        if len(word) > limits.max_word_length:
            raise RequestError(
                "VOCABULARY_INVALID", f"word {index} is longer than {limits.max_word_length} characters: shorten it"
            )
        if not _is_unicode(word):
            raise RequestError(
                "VOCABULARY_INVALID", f"word {index} is no Unicode text: half a surrogate pair stands in it"
            )
    if not words:
        raise RequestError("VOCABULARY_INVALID", "the vocabulary is empty: name at least one class")
    return tuple(words)


def _regions(content: dict[str, Any], limits: Limits) -> dict[str, FloatArray]:
    given: dict[str, Any] = {name: content[name] for name in ("boxes", "points", "point_labels") if name in content}
    if not given or list(given) == ["point_labels"]:
        raise _invalid('no region was asked for: send "boxes" or "points" (an empty list is fine)')
    if "point_labels" in given and "points" not in given:
        raise _invalid('"point_labels" were sent without "points": send both, or neither')
    for name, value in given.items():
        if not isinstance(value, list):
            raise _invalid(f'"{name}" must be a list')
    count = len(given.get("boxes", ())) + len(given.get("points", ()))
    if count > limits.max_regions:
        raise RequestError(
            "TOO_MANY_REGIONS", f"{count} regions are more than {limits.max_regions}: ask about fewer at a time"
        )
    regions: dict[str, FloatArray] = {name: _array(name, value) for name, value in given.items()}
    if "point_labels" in regions:
        regions["point_labels"] = _labels(regions["point_labels"], regions["points"])
    return regions


_FORMS = {
    "boxes": "[[x0, y0, x1, y1], ...]",
    "points": "[[x, y], ...] or [[[x, y], ...], ...], as many clicks for each region",
    "point_labels": "[1, 0, ...] or [[1, 0, ...], ...]",
}


def _array(name: str, value: list[Any]) -> FloatArray:
    """Boxes (N, 4), points (N, P, 2), labels (N, P) or (N,), of finite numbers."""
    array: Any = np.zeros(0) if not value else _rectangle(name, value)
    if name == "boxes":
        array = array.reshape(0, 4) if not value else array
        good = array.ndim == 2 and array.shape[1] == 4
    elif name == "points":
        array = array.reshape(0, 1, 2) if not value else array[:, None] if array.ndim == 2 else array  # (N, P, 2)
        good = array.ndim == 3 and array.shape[1] > 0 and array.shape[2] == 2
    else:
        good = array.ndim in (1, 2)
    if not good:
        raise _invalid(f'"{name}" must be {_FORMS[name]}')
    with np.errstate(over="ignore"):
        numbers: FloatArray = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise RequestError("REGION_INVALID", f'a number of "{name}" is infinite: every coordinate must be a pixel\'s')
    return numbers


def _rectangle(name: str, value: list[Any]) -> Any:
    """(...) float64 of nested lists of the same lengths, which hold numbers and nothing else."""
    if not _all_numbers(value, depth=3):
        raise _invalid(f'"{name}" must be {_FORMS[name]}, numbers only')
    try:
        return np.array(value, np.float64)
    except (ValueError, OverflowError) as error:  # lists of several lengths; a whole number of 400 digits
        raise _invalid(f'"{name}" must be {_FORMS[name]}') from error


def _all_numbers(value: Any, depth: int) -> bool:
    """numpy would take texts and truth values, too."""
    if isinstance(value, list):
        return depth > 0 and all(_all_numbers(item, depth - 1) for item in value)
    return type(value) in (int, float)


def _labels(labels: FloatArray, points: FloatArray) -> FloatArray:
    """(N, P), one for each click."""
    num, clicks = points.shape[:2]
    if labels.shape != (num, clicks) and not (labels.shape == (num,) and clicks == 1) and len(labels) + num:
        raise _invalid(f'"point_labels" must be {_FORMS["point_labels"]}: one for each click of "points"')
    if not np.isin(labels, (0, 1)).all():
        raise _invalid('"point_labels" must be 1, on the region, or 0, beside it')
    return labels.reshape(num, clicks)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _invalid(message: str) -> RequestError:
    return RequestError("REQUEST_INVALID", message)
