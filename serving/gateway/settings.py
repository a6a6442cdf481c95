"""How a gateway is set up."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from regionspot.errors import InputError

_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class GatewaySettings:
    """A gateway's settings.

    Args:
        url: "HOST:PORT" of the Triton server's gRPC port.
        concurrency: requests in flight to Triton; more than its model instances only wait there.
        max_waiting: requests that wait for a turn, or whose body is on its way. Any more are
            refused at once. What they hold in memory is at most (concurrency + max_waiting) x
            max_body_bytes.
        timeout_s: of one request from when its body has arrived, waiting for a turn included.
        token: what callers of /v1 and /metrics must show as a bearer token; None lets everybody in.
        max_body_bytes: of a request; None takes the server's limit of a picture, and
            FORM_SLACK_BYTES for the rest.

    Raises:
        InputError: numbers out of range, a token that no header can carry.
    """

    url: str
    concurrency: int = 4
    max_waiting: int = 32
    timeout_s: float = 60.0
    token: str | None = field(default=None, repr=False)
    max_body_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise InputError(f"concurrency must be 1 or more, not {self.concurrency}")
        if self.max_waiting < 0:
            raise InputError(f"max_waiting must be 0 or more, not {self.max_waiting}")
        if not self.timeout_s > 0:
            raise InputError(f"timeout_s must be more than 0 seconds, not {self.timeout_s}")
        if self.max_body_bytes is not None and self.max_body_bytes < 1:
            raise InputError(f"max_body_bytes must be 1 or more, not {self.max_body_bytes}")
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise InputError(
                "the token must be printable ASCII without spaces, at least one character: choose "
                "another"
            )
