"""The options by which a server lets a command in, the same for every command that asks one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from regionspot.cli.paths import local_path
from regionspot.errors import InputError, plain_text

URL_HELP = (
    "HOST:PORT of its gRPC port, grpcs://HOST:PORT over TLS, or a gateway's https://HOST "
    "(http://HOST:PORT without TLS)"
)

FIRST_ANSWER_S = 10.0
"""A server that restarts is back by then; a wrong address should not cost a minute."""

CREDENTIALS = ("token_file", "ca_file", "client_cert_file", "client_key_file")


def add_credential_options(group: Any) -> None:
    """Add --token-file, --ca-file, --client-cert-file and --client-key-file."""
    group.add_argument(
        "--token-file",
        metavar="FILE",
        type=local_path,
        help="the first line is the token that a gateway wants",
    )
    group.add_argument(
        "--ca-file",
        metavar="PEM",
        type=local_path,
        help="of https and grpcs: the authorities to believe (default: the system's)",
    )
    group.add_argument(
        "--client-cert-file",
        metavar="PEM",
        type=local_path,
        help="a certificate of one's own, where the server wants one",
    )
    group.add_argument("--client-key-file", metavar="PEM", type=local_path, help="its key")


def credentials(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a client that the options name.

    Raises:
        InputError: the token's file cannot be read, or its first line is empty.
    """
    token = None if arguments.token_file is None else read_token(arguments.token_file)
    return {"token": token, **tls_files(arguments)}


def tls_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of `credentials` that a server itself may want."""
    given = {name: getattr(arguments, name) for name in CREDENTIALS if name != "token_file"}
    return {name: path for name, path in given.items() if path is not None}


def read_token(path: Path) -> str:
    """The first line of a file. No message holds any of it.

    Raises:
        InputError: it cannot be read, or that line is blank.
    """
    name = plain_text(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"--token-file {name} cannot be read: {reason}") from error
    token = text.partition("\n")[0].strip()
    if not token:
        raise InputError(f"--token-file {name}: its first line must be the token, and is blank")
    return token
