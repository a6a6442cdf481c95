"""Mutual TLS of a server's gRPC port: a real server, certificates by openssl, and clients with and
without one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from regionspot.cli import serve
from regionspot.errors import InputError, RegionSpotError
from regionspot.serving import canary
from regionspot.serving.client import RegionClient
from regionspot.serving.ports import Ports
from regionspot.serving.tls import ServerTls

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="certificates are made by openssl"
)
KEY = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
START_S = 180.0


def openssl(*words: Any) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate authority, and a certificate of it, `tls.crt`, as cert-manager
    leaves them in a Secret.
    """
    folder = tmp_path_factory.mktemp("authority")
    ca = ("-keyout", folder / "ca.key", "-out", folder / "ca.crt", "-subj", "/CN=tests")
    openssl("req", "-x509", *KEY, *ca)
    request = ("-keyout", folder / "tls.key", "-out", folder / "tls.csr", "-subj", "/CN=server")
    openssl("req", *KEY[:3], *request)
    names = folder / "names"
    names.write_text(
        "subjectAltName = DNS:localhost, DNS:demo-triton\n"
        "extendedKeyUsage = serverAuth, clientAuth\n"
    )
    signed = ("-in", folder / "tls.csr", "-out", folder / "tls.crt", "-days", "2")
    by = ("-CA", folder / "ca.crt", "-CAkey", folder / "ca.key", "-CAcreateserial")
    openssl("x509", "-req", *signed, *by, "-extfile", names)
    return folder


@pytest.fixture(scope="module")
def files(authority: Path) -> ServerTls:
    return ServerTls(authority / "tls.crt", authority / "tls.key", authority / "ca.crt")


@dataclass(frozen=True)
class Secure:
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"grpcs://localhost:{self.port}"


@pytest.fixture(scope="module")
def secure(
    repository: Path, home: Path, files: ServerTls, tmp_path_factory: Any
) -> Iterator[Secure]:
    """`regionspot-serve up` with the three options, once it says that it is ready."""
    ports = Ports(None, 0, 0).resolved()
    log = tmp_path_factory.mktemp("secure") / "up.log"
    words = ["up", "--repository", str(repository), "--home", str(home), "--grpc-port"]
    words += [str(ports.grpc), "--metrics-port", str(ports.metrics), "--tls-cert", str(files.cert)]
    words += ["--tls-key", str(files.key), "--tls-client-ca", str(files.client_ca)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "regionspot.cli.main", "serve", *words],
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + START_S
        while "ready after" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Secure(ports.grpc, process)
    finally:
        process.terminate()
        process.wait(60)


def test_a_client_with_a_certificate_is_answered(
    secure: Secure, files: ServerTls, client: RegionClient, picture: Path
) -> None:
    with RegionClient(secure.url, 30.0, **files.client_files()) as secret:
        found = secret.recognize(picture, [[5, 5, 90, 90]], "pets")
    expected = client.recognize(picture, [[5, 5, 90, 90]], "pets")
    assert found.scores.tolist() == expected.scores.tolist()


def test_a_server_is_reached_by_its_address_and_believed_by_its_name(
    secure: Secure, files: ServerTls
) -> None:
    url = f"grpcs://127.0.0.1:{secure.port}"
    with RegionClient(url, 30.0, server_name="demo-triton", **files.client_files()) as secret:
        assert secret.info().vocabularies
    for name in (None, "other-triton"):
        with (
            RegionClient(url, 30.0, server_name=name, **files.client_files()) as secret,
            pytest.raises(RegionSpotError, match="is not one that can be believed"),
        ):
            secret.info()
    for other in ("127.0.0.1:1", "https://127.0.0.1:1"):
        with pytest.raises(InputError, match="server_name would be ignored"):
            RegionClient(other, server_name="demo-triton")


def test_others_are_not(secure: Secure, files: ServerTls) -> None:
    unsigned = {"ca_file": files.client_ca}
    for url, given in ((secure.url, unsigned), (f"localhost:{secure.port}", {})):
        arguments: dict[str, Any] = given
        with (
            pytest.raises(RegionSpotError),
            RegionClient(url, 3.0, retry=False, **arguments) as stranger,
        ):
            stranger.info()
    with (
        grpc.insecure_channel(f"localhost:{secure.port}") as channel,
        pytest.raises(grpc.RpcError),
    ):
        channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)(b"", timeout=2)


def test_the_canary_speaks_tls(secure: Secure, files: ServerTls) -> None:
    words = ["--url", secure.url, "--timeout", "10", "--ca-file", str(files.client_ca)]
    shown = ["--client-cert-file", str(files.cert), "--client-key-file", str(files.key)]
    assert canary.main([*words, *shown]) == 0
    assert canary.main([*words[:3], "2", *words[4:]]) == 1


def test_options_go_together(authority: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="go together"):
        ServerTls.of(authority / "tls.crt", authority / "tls.key", None)
    assert ServerTls.of(None, None, None) is None
    with pytest.raises(InputError, match="cannot be read"):
        ServerTls.of(authority / "tls.crt", tmp_path / "none.key", authority / "ca.crt")
    words = ["up", "--repository", "r", "--tls-cert", "a", "--tls-key", "b", "--tls-client-ca", "c"]
    assert serve.build_parser().parse_args(words).tls_client_ca == Path("c")
