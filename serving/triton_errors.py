"""What a Triton client raises, as an error of ours.

A status decides; Triton's own words do so only at the beginning of a message, where no word of a
caller's can stand.
"""

from __future__ import annotations

import re
import socket
import ssl

from regionspot.serving.address import Address
from regionspot.serving.contract import NO_SHARED_MEMORY, ServingError, error_of, from_text

PROBE_S = 1.0

OF_GRPC = {
    "DEADLINE_EXCEEDED": "TIMEOUT",
    "UNAVAILABLE": "UNAVAILABLE",
    "CANCELLED": "UNAVAILABLE",
    "ABORTED": "UNAVAILABLE",
    "NOT_FOUND": "UNAVAILABLE",  # a model that is not loaded (yet)
    "RESOURCE_EXHAUSTED": "OVERLOADED",
    "INVALID_ARGUMENT": "REQUEST_INVALID",
    "OUT_OF_RANGE": "REQUEST_INVALID",
    "FAILED_PRECONDITION": "REQUEST_INVALID",
    "ALREADY_EXISTS": "REQUEST_INVALID",
    "UNAUTHENTICATED": "UNAUTHORIZED",
    "PERMISSION_DENIED": "UNAUTHORIZED",
}
"""gRPC's status -> our code; INTERNAL where it is none of these."""

OF_HTTP = {
    "400": "REQUEST_INVALID",
    "401": "UNAUTHORIZED",
    "403": "UNAUTHORIZED",
    "404": "UNAVAILABLE",  # a model that is not loaded (yet)
    "408": "TIMEOUT",
    "413": "IMAGE_TOO_LARGE",
    "429": "OVERLOADED",
    "499": "UNAVAILABLE",
    "502": "UNAVAILABLE",
    "503": "UNAVAILABLE",
    "504": "UNAVAILABLE",
}
"""The status of Triton's HTTP, or of a proxy's before it -> our code, likewise."""

_UNABLE = re.compile(
    r"(?:\[request id: [^\]]*\] )?"
    r"(?:in ensemble '[^']*', )?"
    r"(?:Failed to process the request\(s\) for model instance '[^']*', message: )?"
    rf"(?:Stub process '[^']*' is not healthy|{NO_SHARED_MEMORY})"
)
"""Triton's words for a process of its Python backend that has died, or has no shared memory."""

_STREAM_GONE = re.compile(r"Stream removed|Received RST_STREAM|Connection (?:reset|dropped|closed)")
_OVERSIZED = re.compile(r"(?:Sent|Received|CLIENT: Sent|CLIENT: Received) message larger than max")
_LONG_ERROR = "metadata size exceeds"
_NO_ANSWER = "failed to obtain inference response"  # of tritonclient.http, after its time-out
_NOT_GRPC = ("http1.x server", "Failed parsing HTTP/2", "Socket closed", "reset by peer")
"""gRPC's words for an HTTP/1 or TLS server that answers it, or hangs up."""

_NOT_HTTP = ("Expected HTTP/", "BadStatusLine", "Bad status line")
"""HTTP clients' words for a gRPC server that answers them."""

NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")
"""OpenSSL's and BoringSSL's words for a server that answers without TLS."""

UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")
"""Their words, and gRPC's, for a certificate of another authority or host, or an expired one."""

UNWELCOME = ("CERTIFICATE_REQUIRED", "ALERT_UNKNOWN_CA", "ALERT_BAD_CERT", "TSI_DATA_CORRUPTED")
"""Their words, and gRPC's, for a server that lets in only clients with a certificate it knows."""


def translated(error: Exception, address: Address) -> ServingError:
    """An error of a Triton client. It may ask the port what it speaks, for PROBE_S."""
    if isinstance(error, ServingError):
        return error
    if type(error).__name__ == "InferenceServerException":
        return _of_triton(_text(error, "message"), _text(error, "status"), address)
    return _of_library(error, address)


def tls_failure(text: str, address: Address) -> ServingError | None:
    """What a TLS library's words mean, if anything that asking again does not mend."""
    if any(sign in text for sign in UNTRUSTED):
        return error_of(
            "REQUEST_INVALID",
            f"the certificate of {address.host} is not one that can be believed: name the file of "
            "its authority by ca_file (--ca-file), and the server by a name in the certificate",
        )
    if any(sign in text for sign in UNWELCOME):
        return error_of(
            "UNAUTHORIZED",
            f"{address.host} lets in only clients with a certificate that it knows: give one by "
            "client_cert_file and client_key_file (--client-cert-file, --client-key-file)",
        )
    if any(sign in text for sign in NOT_TLS):
        plain = Address(address.plain_protocol, address.host, address.path)
        return error_of(
            "REQUEST_INVALID", f"{address.host} does not speak TLS: write {plain} if that is meant"
        )
    return None


def _text(error: Exception, name: str) -> object:
    return getattr(error, name)()


def _of_triton(message: object, status: object, address: Address) -> ServingError:
    if not isinstance(message, str):
        return _of_gateway(address)
    if (known := from_text(message)) is not None:
        return known
    if status is None:
        code = "TIMEOUT" if message == _NO_ANSWER else "INTERNAL"
    else:
        name = str(status).removeprefix("StatusCode.")
        code = (OF_GRPC if address.is_grpc else OF_HTTP).get(name, "INTERNAL")
    if code == "UNAVAILABLE" and address.is_grpc and (told := _misnamed_grpc(message, address)):
        return told
    if code == "INTERNAL" and (_UNABLE.match(message) or _STREAM_GONE.match(message)):
        code = "UNAVAILABLE"
    if code == "OVERLOADED":
        code = _exhausted(message)
    return _told(code, message, address)


def _exhausted(message: str) -> str:
    """The code of a RESOURCE_EXHAUSTED: a server that has too much to do, or a message that will
    never fit.
    """
    if _OVERSIZED.match(message):
        return "IMAGE_TOO_LARGE"
    return "INTERNAL" if _LONG_ERROR in message else "OVERLOADED"


def _of_library(error: Exception, address: Address) -> ServingError:
    """What did not come from the server: a connection that failed, a time-out, a wrong port."""
    text = str(error) or type(error).__name__
    if (told := tls_failure(text, address)) is not None:
        return told
    if any(sign in text for sign in _NOT_HTTP):
        return error_of(
            "REQUEST_INVALID",
            f"{address.host} does not speak HTTP: name the server's HTTP port (8000 unless told "
            f"otherwise), or write {address.host} if it is the gRPC port",
        )
    if isinstance(error, TimeoutError):
        return _told("TIMEOUT", text, address)
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError) or library in ("aiohttp", "geventhttpclient"):
        return _told("UNAVAILABLE", text, address)
    return error_of("INTERNAL", text)


def _of_gateway(address: Address) -> ServingError:
    """Triton's errors are text, and a gateway's an object."""
    return error_of(
        "REQUEST_INVALID",
        f"{address} is a gateway, which answers whole questions only: this needs the server "
        "itself, by its gRPC port (HOST:8001 unless told otherwise)",
    )


def _told(code: str, message: str, address: Address) -> ServingError:
    if code == "TIMEOUT":
        message = f"{address.host} gave no answer in time: allow more, or ask for less at once"
    if code == "UNAVAILABLE":
        message = (
            f"{address.host} cannot answer at the moment ({message}); `regionspot-serve up` "
            "starts a server"
        )
    return error_of(code, message)


def _misnamed_grpc(message: str, address: Address) -> ServingError | None:
    """The error to report where another port or protocol was named; None where nothing speaks for
    that. gRPC could not connect, so that all of the message is its own.
    """
    if (told := tls_failure(message, address)) is not None:
        return told
    if not any(sign in message for sign in _NOT_GRPC):
        return None
    if _speaks_http(address):
        return error_of(
            "REQUEST_INVALID",
            f"{address.host} is an HTTP port: name the server's gRPC port (8001 unless told "
            f"otherwise), or write http://{address.host}",
        )
    if not address.is_tls and _speaks_tls(address):
        return error_of(
            "REQUEST_INVALID",
            f"{address.host} speaks TLS: write grpcs://{address.host}, or https://{address.host} "
            "of a gateway",
        )
    return None


def _speaks_http(address: Address) -> bool:
    """Whether a port answers HTTP/1, asked at most PROBE_S at a time."""
    try:
        with socket.create_connection((address.name, address.port), PROBE_S) as probe:
            probe.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return probe.recv(5) == b"HTTP/"
    except OSError:
        return False


def _speaks_tls(address: Address) -> bool:
    """Whether a port answers TLS; nothing is believed of its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((address.name, address.port), PROBE_S) as probe,
            context.wrap_socket(probe),
        ):
            return True
    except OSError:
        return False
