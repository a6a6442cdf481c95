"""Errors as HTTP says them: a status, a stable code and a sentence that tells a stranger nothing
about the inside.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from regionspot.errors import InputError
from regionspot.serving.contract import ServingError

STATUS = {
    "REQUEST_INVALID": 400,
    "IMAGE_INVALID": 400,
    "UNAUTHORIZED": 401,
    "FORBIDDEN": 403,
    "IMAGE_UNKNOWN": 404,
    "IMAGE_TOO_LARGE": 413,
    "REGION_INVALID": 422,
    "TOO_MANY_REGIONS": 422,
    "VOCABULARY_INVALID": 422,
    "VOCABULARY_UNKNOWN": 422,
    "TOO_MANY_WORDS": 422,
    "QUOTA_EXCEEDED": 429,
    "INTERNAL": 500,
    "OVERLOADED": 503,
    "UNAVAILABLE": 503,
    "TIMEOUT": 504,
}
"""The status of each of `regionspot.serving.contract.CODES`, unless the error says another."""

RETRY_AFTER_S = 2
"""When to come back to a server that cannot be reached: it may be starting."""

SAID_OF_FAILURES = {
    "INTERNAL": "the server failed; its log says why, under this request_id",
    "OVERLOADED": "the model server has too much to do: try again later",
    "TIMEOUT": "no answer in time: try again, or ask for fewer regions, fewer new words or no "
    "masks",
    "UNAVAILABLE": "the model server cannot be reached at the moment: try again in a few seconds",
}
"""Said in place of what the inside reports, which names hosts and libraries; the log has that."""


class HttpError(ServingError):
    """A refusal by the gateway itself, with a status other than its code's, or with headers."""

    def __init__(
        self,
        code: str,
        message: str,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code, message)
        self.status = STATUS[code] if status is None else status
        self.headers = dict(headers or {})


def http_error(error: Exception) -> HttpError:
    """Any exception as what the caller is told. What the caller can mend keeps its message."""
    if isinstance(error, HttpError):
        return error
    code = (
        error.code
        if isinstance(error, ServingError)
        else "REQUEST_INVALID"
        if isinstance(error, InputError)
        else "INTERNAL"
    )
    headers = {"Retry-After": str(RETRY_AFTER_S)} if STATUS[code] == 503 else {}
    return HttpError(code, SAID_OF_FAILURES.get(code) or str(error), headers=headers)


def error_response(error: HttpError, request_id: str) -> JSONResponse:
    content = {"error": {"code": error.code, "message": str(error), "request_id": request_id}}
    return JSONResponse(content, error.status, error.headers)
