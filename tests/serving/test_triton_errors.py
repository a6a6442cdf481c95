"""Errors of Triton's clients as ours: by status, and never by a caller's own words."""

from __future__ import annotations

import pytest
from tritonclient.utils import InferenceServerException

from regionspot.serving.address import Address
from regionspot.serving.contract import ServingError
from regionspot.serving.records import ServerRecord
from regionspot.serving.triton import Connection, keepalive_s
from regionspot.serving.triton_errors import OF_GRPC, translated

GRPC, HTTP = Address.parse("127.0.0.1:9"), Address.parse("http://127.0.0.1:9")
WORDS = "'timeout, UNAVAILABLE: x' deadline unavailable is not found stub process socket closed"
FAILED = "Failed to process the request(s) for model instance 'regionspot_0', message: "
STUB = "Stub process 'regionspot_0_0' is not healthy."
SHM = "Failed to increase the shared memory pool size for key 'regionspot_1' to 1048576 bytes."

ERRORS = {
    "words": (GRPC, "INTERNAL", f"no tensor {WORDS}", "INTERNAL"),
    "words of an exception": (
        GRPC,
        "INTERNAL",
        f"{FAILED}{WORDS}",
        "INTERNAL",
    ),
    "words in a refusal": (
        GRPC,
        "INVALID_ARGUMENT",
        f"unexpected input {WORDS}",
        "REQUEST_INVALID",
    ),
    "words behind a code": (
        GRPC,
        "INTERNAL",
        f"REGION_INVALID: box 2, TIMEOUT: {WORDS}",
        "REGION_INVALID",
    ),
    "words behind an id": (
        GRPC,
        "INTERNAL",
        f"[request id: 7] REGION_INVALID: {STUB}",
        "REGION_INVALID",
    ),
    "a model named timeout": (
        GRPC,
        "NOT_FOUND",
        "Request for unknown model: 'timeout' is not found",
        "UNAVAILABLE",
    ),
    "a dead stub": (GRPC, "INTERNAL", STUB, "UNAVAILABLE"),
    "a dead stub at work": (
        GRPC,
        "INTERNAL",
        f"[request id: 7] {FAILED}{STUB}",
        "UNAVAILABLE",
    ),
    "no shared memory": (GRPC, "INTERNAL", SHM, "UNAVAILABLE"),
    "no shared memory at work": (GRPC, "INTERNAL", f"{FAILED}{SHM}", "UNAVAILABLE"),
    "words about shared memory": (GRPC, "INTERNAL", f"no class {SHM}", "INTERNAL"),
    "words about a dead stub": (GRPC, "INTERNAL", f"no class {STUB}", "INTERNAL"),
    "a lost stream": (GRPC, "UNKNOWN", "Stream removed", "UNAVAILABLE"),
    "a queue that is full": (GRPC, "RESOURCE_EXHAUSTED", "queue is full", "OVERLOADED"),
    "a large message": (
        GRPC,
        "RESOURCE_EXHAUSTED",
        "Received message larger than max (9 vs. 8)",
        "IMAGE_TOO_LARGE",
    ),
    "a long error": (
        GRPC,
        "RESOURCE_EXHAUSTED",
        "Stream removed (received metadata size exceeds hard limit 30726 vs 16384)",
        "INTERNAL",
    ),
    "no time left": (GRPC, "DEADLINE_EXCEEDED", "Deadline Exceeded", "TIMEOUT"),
    "a guard": (GRPC, "UNAUTHENTICATED", "who are you?", "UNAUTHORIZED"),
    "by HTTP": (HTTP, "404", f"Request for unknown model: {WORDS}", "UNAVAILABLE"),
    "words by HTTP": (HTTP, "400", f"unexpected input {WORDS}", "REQUEST_INVALID"),
    "a dead stub by HTTP": (HTTP, "500", STUB, "UNAVAILABLE"),
    "a proxy": (HTTP, "502", "an exception occurred in the client", "UNAVAILABLE"),
    "a gateway": (HTTP, "404", {"code": "TIMEOUT", "message": "x"}, "REQUEST_INVALID"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_status_decides(case: str) -> None:
    address, status, message, code = ERRORS[case]
    name = status if status.isdecimal() else f"StatusCode.{status}"
    assert translated(InferenceServerException(message, name), address).code == code


def test_every_status_that_is_named_exists() -> None:
    import grpc

    assert set(OF_GRPC) < {code.name for code in grpc.StatusCode}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_model_whose_name_is_a_caller_s_word(server: ServerRecord, protocol: str) -> None:
    """By a real server: 'deadline' is no deadline, and nothing is waited for."""
    url = server.ports.grpc_url if protocol == "grpc" else server.ports.http_url
    with Connection(url, 20, retry=False) as connection, pytest.raises(ServingError) as raised:
        connection.config("timed out, TIMEOUT: deadline")
    assert raised.value.code == "UNAVAILABLE"


@pytest.mark.parametrize("timeout_s", [0.1, 10, 60, 61, 75, 120, 600, 3600, 7200])
def test_pings_of_one_silence_are_few(timeout_s: float) -> None:
    """Triton ends a connection at the fifth that comes within 5 minutes of the one before, counted
    from the last answer on: measured with 2.51, whose defaults are gRPC's.
    """
    assert 5 * keepalive_s(timeout_s) > timeout_s
    assert keepalive_s(timeout_s) <= max(15, timeout_s / 2)
