"""From an HTTP request to a question: everything that can be refused before the model server is
troubled.

A multipart form with two parts: `request`, JSON with the KEYS below, and `image`, a file, unless
the JSON names a handle.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from regionspot.serving.contract import DEFAULT_TOP_K, Limits, RequestError, coded
from regionspot.serving.gateway.errors import HttpError
from regionspot.serving.gateway.handles import PLAIN, HandleSeal
from regionspot.serving.messages import Question, RemoteImage
from regionspot.serving.picture import check_picture
from regionspot.structures import Prompts, as_prompts

KEYS = ("boxes", "points", "point_labels", "vocabulary", "words", "top_k", "masks", "image_handle")
PARTS = ("image", "request")
FORM_SLACK_BYTES = 4 << 20
"""What a form may hold besides the picture; the largest JSON is 2048 words of 256 characters,
escaped.
"""

_HANDLE = re.compile(r"[\x21-\x7e]{1,256}")
_MAX_FILE_NAME = 255


@dataclass(frozen=True, eq=False)
class Form:
    """What arrived: the JSON's text, and the image file with the caller's name of it, or None and
    "".
    """

    request: str
    image: bytes | None
    file_name: str

    @property
    def num_bytes(self) -> int:
        return len(self.request) + len(self.image or b"")


def check_headers(request: Request, max_bytes: int) -> None:
    """Refuse by the header what need not be read.

    Raises:
        HttpError: 415 for another content type, 413 for a body that says it is too large.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "multipart/form-data":
        raise HttpError(
            "REQUEST_INVALID",
            "send a form: Content-Type must be multipart/form-data, with the parts image and "
            "request",
            415,
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large(max_bytes)


def declared_bytes(request: Request, max_bytes: int) -> int:
    """How large a body says that it is; `max_bytes` where it does not say."""
    declared = request.headers.get("content-length", "")
    return min(int(declared), max_bytes) if declared.isdecimal() else max_bytes


async def read_form(request: Request, max_bytes: int, suffix: bytes = b"") -> Form:
    """Reads a form into memory, counting its bytes as they come: what Content-Length says proves
    nothing.

    Args:
        suffix: is added to the image's file.

    Raises:
        HttpError: 413 once it is too large.
        RequestError: no such form.
    """
    counted = Request(request.scope, _counting(request.receive, max_bytes))
    parser = _MemoryParser(
        request.headers, counted.stream(), max_files=2, max_fields=2, max_part_size=FORM_SLACK_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(
            "REQUEST_INVALID", f"the form cannot be read: {error.message}"
        ) from error
    except (ValueError, LookupError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            "REQUEST_INVALID", "the form cannot be read: its charset must be UTF-8"
        ) from error
    try:
        return await _form_of(form, suffix)
    finally:
        await form.close()


def question_of(form: Form, limits: Limits, seal: HandleSeal = PLAIN) -> Question:
    """Reads the question in a form and checks it against the server's limits.

    Args:
        seal: opens the caller's image handles.

    Raises:
        RequestError: with the code that says why not.
    """
    content = _json(form.request)
    image = _image(form.image, content.get("image_handle"), seal)
    vocabulary = _vocabulary(content.get("vocabulary"), content.get("words"), limits)
    top_k, masks = content.get("top_k", DEFAULT_TOP_K), content.get("masks", False)
    if type(top_k) is not int:
        raise _invalid('"top_k" must be a whole number')
    if not isinstance(masks, bool):
        raise _invalid('"masks" must be true or false')
    question = Question(image, vocabulary, _prompts(content), top_k, masks)
    question.check(limits)
    if isinstance(image, bytes):
        check_picture(image, limits)
    return question


def words_of(body: bytes) -> list[str]:
    """The words in the JSON body of a vocabulary: {"words": [...]}, or the list alone.

    Raises:
        RequestError: no such body.
    """
    try:
        content = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _invalid('the body is no JSON: send {"words": ["cat", "dog"]}') from error
    words = content.get("words") if isinstance(content, dict) else content
    if isinstance(content, dict) and set(content) != {"words"}:
        raise _invalid('the body must have the key "words" and no other')
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _invalid('"words" must be a list of texts')
    return words


def too_large(max_bytes: int) -> HttpError:
    return HttpError(
        "IMAGE_TOO_LARGE", f"the request has more than {max_bytes} bytes: scale the picture down"
    )


class _MemoryParser(MultiPartParser):
    """Starlette's, without files on disk: bodies are bounded, and a container may have no place to
    write.
    """

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


async def _form_of(form: FormData, suffix: bytes) -> Form:
    parts = dict(form)
    if unknown := sorted(set(parts) - set(PARTS)):
        raise _invalid(
            f"the form has a part {unknown[0][:64]!r} that is not known here: send "
            f"{' and '.join(PARTS)}"
        )
    if len(parts) < len(form.multi_items()):
        raise _invalid("a part of the form was sent twice: send each once")
    request, image = parts.get("request"), parts.get("image")
    if isinstance(request, UploadFile):  # curl -F request=@file
        if (request.size or 0) > FORM_SLACK_BYTES:  # the parser bounds only parts that are no files
            raise _invalid(f'the part "request" has more than {FORM_SLACK_BYTES} bytes')
        request = (await request.read()).decode("utf-8", "replace")
    if request is None:
        raise _invalid(
            'the form has no part "request": send JSON in it, such as {"boxes": [[0, 0, 9, 9]], '
            '"words": ["cat"]}'
        )
    if isinstance(image, str):
        raise _invalid('the part "image" must be a file: give it a file name')
    if image is None:
        return Form(request, None, "")
    name = re.split(r"[/\\]", image.filename or "")[-1]
    if suffix and image.size:
        image.file.seek(0, io.SEEK_END)
        image.file.write(suffix)
        image.file.seek(0)
    return Form(request, await image.read(), name[:_MAX_FILE_NAME])


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        where = (
            f" (line {error.lineno}, column {error.colno})"
            if isinstance(error, json.JSONDecodeError)
            else ""
        )
        raise _invalid(
            f'the part "request" is no JSON{where}; NaN and Infinity are none either'
        ) from error
    if not isinstance(content, dict):
        raise _invalid('the part "request" must be a JSON object: {"boxes": ..., "words": ...}')
    if unknown := [key for key in content if key not in KEYS]:
        names = ", ".join(repr(key[:64]) for key in unknown[:5])
        raise _invalid(
            f"the request has keys that are not known here: {names}; known are {', '.join(KEYS)}"
        )
    return {key: value for key, value in content.items() if value is not None}


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _image(file: bytes | None, handle: Any, seal: HandleSeal) -> bytes | RemoteImage:
    if (file is None) == (handle is None):
        raise _invalid(
            'send either a picture as the part "image", or "image_handle" in the request'
        )
    if file is not None:
        return file
    if not isinstance(handle, str) or not _HANDLE.fullmatch(handle):
        raise _invalid('"image_handle" must be what an earlier answer said, as text')
    return RemoteImage(seal.open(handle))


def _vocabulary(name: Any, words: Any, limits: Limits) -> str | tuple[str, ...]:
    if (name is None) == (words is None):
        raise _invalid('send either "words", a list, or "vocabulary", the name of a registered one')
    if name is not None:
        if not isinstance(name, str):
            raise _invalid('"vocabulary" must be a name')
        if not name or len(name) > limits.max_word_length:
            raise RequestError("VOCABULARY_UNKNOWN", "no vocabulary of that name is registered")
        return name
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _invalid('"words" must be a list of texts')
    return tuple(words)


def _prompts(content: dict[str, Any]) -> tuple[Prompts, ...]:
    given = {name: content[name] for name in ("boxes", "points", "point_labels") if name in content}
    for name, value in given.items():
        if not isinstance(value, list) or not _all_numbers(value, depth=3):
            raise _invalid(f'"{name}" must be a list that holds lists or numbers only')
    with coded():
        return as_prompts(**given)


def _all_numbers(value: Any, depth: int) -> bool:
    """numpy would take texts and truth values, too."""
    if isinstance(value, list):
        return depth > 0 and all(_all_numbers(item, depth - 1) for item in value)
    return type(value) in (int, float)


def _invalid(message: str) -> RequestError:
    return RequestError("REQUEST_INVALID", message)
