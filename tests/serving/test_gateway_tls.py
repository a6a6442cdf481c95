"""https, certificates of callers, and certificates that change."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from regionspot.cli.main import main
from regionspot.errors import InputError
from regionspot.serving.gateway import GatewaySettings, TlsFiles, make_app, make_server
from regionspot.serving.gateway import app as app_module
from regionspot.serving.gateway import connections as connections_module
from regionspot.serving.gateway.upstream import connector
from tests.serving.gateways import GOOD, PICTURE, Moody, ask, running, until

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="certificates are made by openssl"
)


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def certificate(folder: Path, name: str, ca: Path | None = None) -> TlsFiles:
    """NAME.pem and NAME.key, signed by a root of the same folder, or a root itself."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    words += [
        "-nodes",
        "-days",
        "2",
        "-subj",
        f"/CN={name}",
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    if ca is not None:
        words += ["-CA", str(ca), "-CAkey", str(ca.with_suffix(".key"))]
        words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        words += ["-addext", "basicConstraints=critical,CA:FALSE"]
    openssl(*words)
    return TlsFiles(cert, key)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder, "root")
    certificate(folder, "stranger")
    return folder


@contextmanager
def trusting(
    base: httpx.Client, root: Path, client: TlsFiles | None = None
) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=str(root))
    if client is not None and client.cert is not None:
        context.load_cert_chain(client.cert, client.key)
    url = f"https://127.0.0.1:{base.base_url.port}"
    with httpx.Client(base_url=url, verify=context, timeout=30) as secure:
        yield secure


def test_https(roots: Path) -> None:
    own = certificate(roots, "gateway", roots / "root.pem")
    with running(GatewaySettings("unused:1", tls=own), lambda *_: Moody()) as plain:
        with trusting(plain, roots / "root.pem") as client:
            assert ask(client, PICTURE, **GOOD).status_code == 200
            own_origin = {"Origin": str(client.base_url).rstrip("/")}
            assert client.get("/v1/info", headers=own_origin).status_code == 200
        with (
            trusting(plain, roots / "stranger.pem") as client,
            pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            client.get("/healthz")
        with pytest.raises(httpx.TransportError):
            plain.get("/healthz")


def test_callers_show_certificates(roots: Path) -> None:
    own = certificate(roots, "gateway", roots / "root.pem")
    chosen = GatewaySettings("unused:1", tls=TlsFiles(own.cert, own.key, roots / "root.pem"))
    known = certificate(roots, "caller", roots / "root.pem")
    unknown = certificate(roots, "unknown", roots / "stranger.pem")
    with running(chosen, lambda *_: Moody()) as plain:
        with trusting(plain, roots / "root.pem", known) as client:
            assert ask(client, PICTURE, **GOOD).status_code == 200
        for other in (None, unknown):
            with (
                trusting(plain, roots / "root.pem", other) as client,
                pytest.raises(httpx.TransportError),
            ):
                client.get("/healthz")


def test_a_certificate_changes_without_a_restart(
    roots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "REFRESH_S", 0.05)
    first = certificate(roots, "gateway", roots / "root.pem")
    assert first.cert and first.key
    cert, key = tmp_path / "cert", tmp_path / "key"

    def install(files: TlsFiles) -> None:
        assert files.cert and files.key
        for source, target in ((files.cert, cert), (files.key, key)):
            shutil.copy(source, tmp_path / "next")
            (tmp_path / "next").rename(target)

    def is_trusted(plain: httpx.Client, root: str) -> bool:
        with trusting(plain, roots / root) as client:
            try:
                return client.get("/healthz").status_code == 200
            except httpx.ConnectError:
                return False

    install(first)
    with running(GatewaySettings("unused:1", tls=TlsFiles(cert, key)), lambda *_: Moody()) as plain:
        assert is_trusted(plain, "root.pem")
        install(certificate(roots, "next", roots / "stranger.pem"))
        until(lambda: is_trusted(plain, "stranger.pem"))
        key.write_text("damaged")
        time.sleep(0.3)
        assert is_trusted(plain, "stranger.pem")
        install(first)
        until(lambda: is_trusted(plain, "root.pem"))


def test_a_handshake_has_a_deadline(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio waits a minute for one, before any protocol hears of the connection."""
    monkeypatch.setattr(connections_module, "HEADER_S", 0.5)
    monkeypatch.setattr(connections_module, "SWEEP_S", 0.1)
    own = certificate(roots, "gateway", roots / "root.pem")
    chosen = GatewaySettings("unused:1", tls=own, max_connections=4)
    with running(chosen, lambda *_: Moody()) as plain:
        address = (plain.base_url.host, plain.base_url.port or 0)
        slow = [socket.create_connection(address, timeout=5) for _ in range(10)]
        with trusting(plain, roots / "root.pem") as client:
            assert client.get("/healthz").status_code == 200
        for connection in slow:
            with connection:
                try:
                    assert connection.recv(1) == b""
                except ConnectionResetError:
                    continue


def test_files_that_cannot_be_used(
    roots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = certificate(roots, "gateway", roots / "root.pem")
    (tmp_path / "damaged").write_text("-----BEGIN CERTIFICATE-----\nx\n")
    for files in (
        TlsFiles(tmp_path / "none", own.key),
        TlsFiles(own.cert, roots / "root.key"),
        TlsFiles(own.cert, own.key, tmp_path / "damaged"),
    ):
        chosen = GatewaySettings("unused:1", tls=files)
        with pytest.raises(InputError, match="certificate or key"):
            make_server(chosen, app=make_app(chosen, lambda *_: Moody()))
    for half in (TlsFiles(own.cert), TlsFiles(None, own.key)):
        with pytest.raises(InputError, match="belong together"):
            GatewaySettings("unused:1", tls=half)
        with pytest.raises(InputError, match="belong together"):
            GatewaySettings("unused:1", upstream_tls=half)
    with pytest.raises(InputError, match="one of the gateway"):
        GatewaySettings("unused:1", tls=TlsFiles(ca=roots / "root.pem"))
    assert main(["serve", "web", "--tls-cert", str(own.cert)]) == 2
    assert "belong together" in capsys.readouterr().err


def test_the_connection_to_the_server_gets_its_files(tmp_path: Path) -> None:
    connect = connector(TlsFiles(tmp_path / "cert", tmp_path / "key", tmp_path / "ca"))
    assert getattr(connect, "keywords") == {  # noqa: B009 - a partial, which Connect hides
        "retry": False,
        "ca_file": tmp_path / "ca",
        "client_cert_file": tmp_path / "cert",
        "client_key_file": tmp_path / "key",
    }
