"""Where a server listens, and what a client shows to be let in."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regionspot.errors import InputError, shown

TLS = {"grpcs": "grpc", "https": "http"}
"""Protocols over TLS, and what they are without it."""

PROTOCOLS = ("grpc", "http", *TLS)
DEFAULT_PORTS = {"http": 80, "https": 443}
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/:@?#\[\]]+)(?::([0-9]{1,5}))?")
_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)*")
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Address:
    """Where a server listens, and by which protocol.

    Args:
        protocol: one of PROTOCOLS.
        host: "NAME:PORT".
        path: of http and https, what comes before every path of the server, without a slash at
            its end: "" or "/regionspot".

    >>> Address.parse("localhost:8001").protocol
    'grpc'
    >>> str(Address.parse("https://example.org/regionspot/"))
    'https://example.org:443/regionspot'
    """

    protocol: str
    host: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.protocol}://{self.host}{self.path}"

    @property
    def is_grpc(self) -> bool:
        return self.plain_protocol == "grpc"

    @property
    def is_tls(self) -> bool:
        return self.protocol in TLS

    @property
    def plain_protocol(self) -> str:
        """grpc or http, with TLS or without."""
        return TLS.get(self.protocol, self.protocol)

    @property
    def name(self) -> str:
        """The host's name or number, without the port and without brackets."""
        return self.host.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.host.rpartition(":")[2])

    @classmethod
    def parse(cls, url: str) -> Address:
        """From "HOST:PORT", which is gRPC, or "PROTOCOL://HOST:PORT". http and https do without
        the port, and take a path.

        Raises:
            InputError: anything else.
        """
        scheme, separator, rest = url.rpartition("://")
        protocol = scheme if separator else "grpc"
        if "@" in rest:
            raise InputError(
                "a server's address holds no name and password: leave out what is before the @; "
                "a gateway takes a token"
            )
        authority, slash, path = rest.partition("/")
        found = _AUTHORITY.fullmatch(authority)
        port = DEFAULT_PORTS.get(protocol, 0)
        if found is not None and found[2]:
            port = int(found[2])
        prefix = (slash + path).rstrip("/")
        if (
            protocol not in PROTOCOLS
            or found is None
            or not 0 < port < 65536
            or not _PATH.fullmatch(prefix)
            or (prefix and protocol not in DEFAULT_PORTS)
        ):
            raise InputError(
                f"{shown(url)} is no server's address: write HOST:PORT of its gRPC port, "
                "http://HOST:PORT, or https://HOST of a gateway"
            )
        return cls(protocol, f"{found[1]}:{port}", prefix)


@dataclass(frozen=True)
class Credentials:
    """What a client shows a server, and by which authority it believes the server's certificate.

    Args:
        token: that a gateway wants; in no `repr` and no message.
        ca_file: PEM certificates of the authorities to believe; None are those of the system.
        client_cert_file: the client's own certificate, PEM, where the server wants one.
        client_key_file: its key, PEM.
        server_name: of grpcs, the name in the server's certificate, where it is not the one by
            which the server is reached.

    Raises:
        InputError: a certificate without its key, a token that no header can carry.
    """

    token: str | None = field(default=None, repr=False)
    ca_file: str | Path | None = None
    client_cert_file: str | Path | None = None
    client_key_file: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise InputError(
                "the token must be printable ASCII without spaces, at least one character"
            )
        if (self.client_cert_file is None) != (self.client_key_file is None):
            raise InputError(
                "client_cert_file and client_key_file go together: give both, or neither"
            )

    @property
    def of_grpc(self) -> dict[str, Any]:
        """All that a connection over gRPC takes, by the names of its arguments."""
        name = {} if self.server_name is None else {"server_name": self.server_name}
        return self.files | name

    @property
    def files(self) -> dict[str, Any]:
        """Paths of those that were given, by the names of their arguments."""
        named = {
            "ca_file": self.ca_file,
            "client_cert_file": self.client_cert_file,
            "client_key_file": self.client_key_file,
        }
        return {name: path for name, path in named.items() if path is not None}

    def ssl_context(self, library: Any = ssl) -> Any:
        """What a client of TLS needs.

        Args:
            library: Python's `ssl`, or a module in its place.

        Raises:
            InputError: a file holds no such certificates, or no key of the certificate.
        """
        try:
            context = library.create_default_context(cafile=self.ca_file)
        except (ssl.SSLError, OSError) as error:
            raise InputError(
                f"ca_file {shown(str(self.ca_file))} holds no PEM certificates"
            ) from error
        if self.client_cert_file is not None:
            try:
                context.load_cert_chain(self.client_cert_file, self.client_key_file)
            except (ssl.SSLError, OSError) as error:
                raise InputError(
                    f"client_cert_file {shown(str(self.client_cert_file))} and client_key_file "
                    f"{shown(str(self.client_key_file))} hold no PEM certificate and its key"
                ) from error
        return context

    def check_for(self, address: Address) -> None:
        """Checks that an address has use for them, and that the files can be used.

        Raises:
            InputError: they would be ignored, or a file cannot be read.
        """
        if self.token is not None and address.is_grpc:
            raise InputError(
                f"{address} is Triton's gRPC port, which asks for no token: give the gateway's "
                "address, https://HOST, or leave the token out"
            )
        if self.files and not address.is_tls:
            raise InputError(
                f"{', '.join(self.files)} would be ignored, since {address} does without TLS: "
                f"write {address.protocol}s://{address.host}{address.path}, or leave it out"
            )
        if self.server_name is not None and address.protocol != "grpcs":
            raise InputError(
                f"server_name would be ignored by {address}: it is for grpcs, so leave it out"
            )
        for name, path in self.files.items():
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise InputError(
                    f"{name} {shown(str(path))} cannot be read ({error.strerror})"
                ) from error
        if self.files:
            self.ssl_context()
