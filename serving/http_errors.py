"""Refusals over HTTP as errors of ours: a gateway's JSON, or what a proxy before it says."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from regionspot.errors import shown, visible
from regionspot.serving.address import Address
from regionspot.serving.contract import CODES, RequestError, ServingError, error_of
from regionspot.serving.protocols import NothingThereError

MAX_MESSAGE = 2000

OF_STATUS = {
    401: "UNAUTHORIZED",
    403: "UNAUTHORIZED",
    408: "TIMEOUT",
    413: "IMAGE_TOO_LARGE",
    425: "UNAVAILABLE",
    429: "OVERLOADED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "UNAVAILABLE",
}
"""The code of a status that comes without one. Others are the caller's fault below 500."""

NOT_THERE = (404, 405, 410)
_REDIRECTS = range(300, 400)


@dataclass(frozen=True)
class HttpReply:
    """What a server answered, whatever it is.

    Args:
        path: that was asked, behind the address.
    """

    address: Address
    path: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        """The content's type, without its parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


def refusal(reply: HttpReply) -> ServingError:
    """The error that an answer other than 200 means."""
    error = _of_gateway(reply)
    if error is None or (error.code == "REQUEST_INVALID" and reply.status in NOT_THERE):
        error = _of_others(reply)
    if error.code in ("OVERLOADED", "UNAVAILABLE"):
        error.retry_after_s = retry_after_s(reply.headers.get("retry-after", ""))
    return error


def unusable(reply: HttpReply) -> ServingError:
    """The error of an answer 200 whose body is no JSON."""
    if reply.kind == "application/json":
        return error_of("UNAVAILABLE", f"the answer of {reply.address} was cut off")
    return error_of(
        "INTERNAL",
        f"{reply.address} answers {reply.path} with {shown(reply.kind or 'no type')}, not JSON: is "
        "this a gateway's address, or does something before it want a login?",
    )


def retry_after_s(header: str) -> float | None:
    """Seconds that a Retry-After header asks to wait: a number of them, or a date. None where it
    says neither.
    """
    text = header.strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _of_gateway(reply: HttpReply) -> ServingError | None:
    """The error that a gateway of ours says; None for an answer of something else."""
    told = _json(reply.body)
    told = told.get("error") if isinstance(told, dict) else None
    if not isinstance(told, dict) or not isinstance(told.get("message"), str):
        return None
    message = visible(told["message"])[:MAX_MESSAGE]
    code = told.get("code")
    if code not in CODES:  # of a later release
        code = _code_of(reply.status)
    error = error_of(code, message)
    if not isinstance(error, RequestError) and isinstance(told.get("request_id"), str):
        error = error_of(code, f"{message} (request {shown(visible(told['request_id']))})")
    return error


def _of_others(reply: HttpReply) -> ServingError:
    """The error of an answer of Triton's own HTTP, or of a proxy's."""
    address, status = reply.address, reply.status
    code = _code_of(status)
    if status in NOT_THERE:
        return NothingThereError(
            "REQUEST_INVALID",
            f"{address} has nothing at {reply.path} ({status}): it is neither a gateway nor a "
            "Triton server, or its address lacks a path",
        )
    if status in _REDIRECTS:
        place = shown(visible(reply.headers.get("location", "")), 200)
        return error_of(
            "REQUEST_INVALID",
            f"{address} redirects to {place}, and nothing is sent there that it was not meant "
            "for: give that address, if it is the gateway's",
        )
    return error_of(code, _SAID.get(code, _SAID_OF_OTHERS).format(address=address, status=status))


_SAID = {
    "UNAUTHORIZED": "something before {address} lets nobody in without other credentials "
    "({status})",
    "IMAGE_TOO_LARGE": "something before {address} takes no request of that size ({status}): scale "
    "the image down, or raise the limit of a request's body there",
    "OVERLOADED": "something before {address} takes fewer requests at a time ({status}): retry "
    "later",
    "UNAVAILABLE": "{address} cannot answer at the moment: something before it says {status}",
    "TIMEOUT": "the request did not reach {address} in time ({status})",
    "REQUEST_INVALID": "{address} refuses the request without a reason ({status})",
}
_SAID_OF_OTHERS = "{address} failed ({status})"


def _code_of(status: int) -> str:
    return OF_STATUS.get(status, "REQUEST_INVALID" if status < 500 else "INTERNAL")


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
