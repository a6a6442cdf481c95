"""How a gateway is set up."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path

from regionspot.errors import InputError
from regionspot.serving.tracing import traces_url

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one end of a TLS connection.

    Args:
        cert: its certificate, with those that lead to the root.
        key: its private key.
        ca: the roots that it trusts for the other end.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None


@dataclass(frozen=True)
class GatewaySettings:
    """A gateway's settings.

    Args:
        url: "HOST:PORT" of the Triton server's gRPC port; "grpcs://HOST:PORT" over TLS. Several
            servers with commas between them; a name with several addresses is a server at each.
        canary_url: of servers with another release of the model.
        canary_share: of the images that go to them, from 0 to 1.
        vocabularies: a folder of vocabularies, see `regionspot.serving.gateway.vocabularies`; None
            keeps those that callers put in memory.
        concurrency: requests in flight to Triton; more than its model instances only wait there.
        max_waiting: requests that wait for a turn, or whose body is on its way. Any more are
            refused at once.
        timeout_s: of one request from when its body has arrived, waiting for a turn included.
        token: what callers of /v1 and /metrics must show as a bearer token; None lets everybody in,
            unless one of the files below is given.
        max_body_bytes: of a request; None takes the server's limit of a picture, and
            FORM_SLACK_BYTES for the rest.
        max_buffered_bytes: of all bodies in memory, half of them on their way to Triton. Who does
            not fit waits, then is refused. It bounds the memory of the process at its peak: about
            75 MiB and three times as much, see `regionspot.benchmarks.serving_memory`.
        token_file: in place of `token`, a file whose first line it is.
        tokens_file: TOML with named tokens and their quotas, see
            `regionspot.serving.gateway.tokens`.
        metrics_token_file: the first line is a token that opens /metrics and nothing else.
        allow_anonymous: listen beyond loopback without any token.
        allowed_hosts: names that requests may use for this gateway. None takes LOOPBACK_HOSTS where
            anybody may ask, and any name elsewhere.
        trusted_proxies: addresses or networks whose X-Forwarded-For is believed.
        max_connections: open ones; the number of file descriptors may allow fewer. Beyond it, the
            one that has been idle for longest is closed.
        tls: for callers: with `ca`, they must show a certificate.
        upstream_tls: for the connection to Triton: with `cert` and `key`, the gateway shows one.
        otlp_endpoint: where traces go, see `regionspot.serving.gateway.tracing.export_to`.

    Files are read again when they change.

    Raises:
        InputError: numbers out of range, a token that no header can carry, more than one kind of
            token, half of a certificate and its key, an `otlp_endpoint` that is no URL.
    """

    url: str
    canary_url: str | None = None
    canary_share: float = 0.05
    vocabularies: Path | None = None
    concurrency: int = 4
    max_waiting: int = 32
    timeout_s: float = 60.0
    token: str | None = field(default=None, repr=False)
    max_body_bytes: int | None = None
    max_buffered_bytes: int = 256 << 20
    token_file: Path | None = None
    tokens_file: Path | None = None
    metrics_token_file: Path | None = None
    allow_anonymous: bool = False
    allowed_hosts: tuple[str, ...] | None = None
    trusted_proxies: tuple[str, ...] = ()
    max_connections: int = 1024
    tls: TlsFiles = TlsFiles()
    upstream_tls: TlsFiles = TlsFiles()
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise InputError(
                "the token must be printable ASCII without spaces, at least one character: choose "
                "another"
            )
        given = [self.token, self.token_file, self.tokens_file]
        if sum(one is not None for one in given) > 1:
            raise InputError("token, token_file and tokens_file exclude each other: give one")
        for network in self.trusted_proxies:
            try:
                ip_network(network, strict=False)
            except ValueError as error:
                raise InputError(
                    f"trusted_proxies: {network!r} is no address or network, such as 10.0.0.0/8"
                ) from error
        for name in ("tls", "upstream_tls"):
            files: TlsFiles = getattr(self, name)
            if (files.cert is None) != (files.key is None):
                raise InputError(f"{name}: a certificate and its key belong together: give both")
        if self.tls.ca is not None and self.tls.cert is None:
            raise InputError("tls: certificates of callers need one of the gateway, too")
        if self.otlp_endpoint is not None:
            traces_url(self.otlp_endpoint)

    def _check_numbers(self) -> None:
        for name in ("concurrency", "max_body_bytes", "max_buffered_bytes", "max_connections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")
        if not 0 <= self.canary_share <= 1:
            raise InputError(f"canary_share must be from 0 to 1, not {self.canary_share}")
        if self.max_waiting < 0:
            raise InputError(f"max_waiting must be 0 or more, not {self.max_waiting}")
        if not self.timeout_s > 0:
            raise InputError(f"timeout_s must be more than 0 seconds, not {self.timeout_s}")

    @property
    def anonymous(self) -> bool:
        """Whether anybody may ask."""
        return self.token is None and self.token_file is None and self.tokens_file is None
