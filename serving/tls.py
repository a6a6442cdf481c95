"""Mutual TLS of a Triton server's gRPC port: who connects must show a certificate, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regionspot.errors import InputError


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a server.

    Args:
        cert: Its certificate. It names `localhost`, and may be shown by clients as well: the
            supervisor and the canary are clients of their own server.
        key: The certificate's private key.
        client_ca: The roots that vouch for clients' certificates, and for this one.

    Raises:
        InputError: A file cannot be read.
    """

    cert: Path
    key: Path
    client_ca: Path

    def __post_init__(self) -> None:
        for path in (self.cert, self.key, self.client_ca):
            try:
                path.read_bytes()
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from error

    @classmethod
    def of(cls, cert: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
        """Of a command's options; None where there are none.

        Raises:
            InputError: Only some are given.
        """
        if cert is None and key is None and client_ca is None:
            return None
        if cert is None or key is None or client_ca is None:
            raise InputError(
                "--tls-cert, --tls-key and --tls-client-ca go together: TLS alone would not keep "
                "strangers from a server that asks for no token"
            )
        return cls(cert.absolute(), key.absolute(), client_ca.absolute())

    def up_options(self) -> list[str]:
        """Of `regionspot-serve up`."""
        files = {"--tls-cert": self.cert, "--tls-key": self.key, "--tls-client-ca": self.client_ca}
        return [text for option, path in files.items() for text in (option, str(path))]

    def triton_options(self) -> list[str]:
        return [
            "--grpc-use-ssl=true",
            "--grpc-use-ssl-mutual=true",
            f"--grpc-server-cert={self.cert}",
            f"--grpc-server-key={self.key}",
            f"--grpc-root-cert={self.client_ca}",
        ]

    def client_files(self) -> dict[str, Any]:
        """Arguments of `RegionClient` for a client on this machine."""
        return {
            "ca_file": self.client_ca,
            "client_cert_file": self.cert,
            "client_key_file": self.key,
        }
